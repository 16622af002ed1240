"""rewrite.affine.constants: products and sums by a constant per channel, and what only looks so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from passes import FoldNorm
from rewrite.protocol import Applied, apply_pass


class Scaled(nn.Module):
    """conv -> lines with a constant per channel -> conv."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.lines(self.one(x)))

    def lines(self, y: Tensor) -> Tensor:
        return y.mul_(self.gamma)


class ReadElsewhere(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        view = y.transpose(2, 3)
        view.mul_(self.gamma)
        return y


class OnTheInput(Scaled):
    """Whoever gave the input sees it scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(3, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.lines(x)))


class IntoTheConstant(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        return y * self.gamma.detach().clone().add_(1)


class Wider(Scaled):
    """One channel times four numbers: the product makes four channels of one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 1, 1)

    def lines(self, y: Tensor) -> Tensor:
        return y * self.gamma


class Deeper(Scaled):
    """The product gives the value one more axis."""

    def lines(self, y: Tensor) -> Tensor:
        return (y.mean((2, 3)) * self.gamma.view(4, 1, 1, 1).expand(4, 1, 1, 1)).sum(3)[..., None]

    def forward(self, x: Tensor) -> Tensor:
        return self.lines(self.one(x))


def fold(kind: type[Scaled]) -> Applied:
    torch.manual_seed(0)
    model = kind().double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        applied = apply_pass(FoldNorm(), copy.deepcopy(model), (x.clone(),))
        for _ in range(2):  # the second call sees what the first one has written
            want, got = model(x.clone()), applied.model(x.clone())
            assert (got - want).abs().max() <= 1e-11 * want.abs().max()
    return applied


def test_a_product_in_place_folds_where_nobody_else_sees_it() -> None:
    assert len(fold(Scaled).changes) == 1


@pytest.mark.parametrize("kind", [ReadElsewhere, OnTheInput, IntoTheConstant, Wider, Deeper])
def test_what_is_no_product_of_one_value_stays(kind: type[Scaled]) -> None:
    assert not fold(kind).changes


class OneNumber(Scaled):
    """A layer scale of one number for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(()) + 0.5)

    def lines(self, y: Tensor) -> Tensor:
        return y * self.gamma


class OneNumberOfOneAxis(OneNumber):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1) + 0.5)

    def lines(self, y: Tensor) -> Tensor:
        return y / self.gamma


class Positions(Scaled):
    """An embedding of positions: one number a channel and a position."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 4, 5, 5))

    def lines(self, y: Tensor) -> Tensor:
        return y + self.gamma


class Rooted(Positions):
    def lines(self, y: Tensor) -> Tensor:
        return self.gamma - y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OneNumber, "one number for all channels"),
        (OneNumberOfOneAxis, "one number for all channels"),
        (Positions, "the constant (1x4x5x5) differs along several axes"),
        (Rooted, "the constant (1x4x5x5) differs along several axes"),
    ],
)
def test_a_constant_that_is_not_per_channel_leaves_its_reason(
    kind: type[Scaled], reason: str
) -> None:
    applied = fold(kind)
    (skip,) = applied.skips
    assert not applied.changes and skip.target == "gamma" and reason in skip.reason


class MatrixOfItsOwn(Scaled):
    """A product of matrices with a parameter is a layer, and no constant per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(5, 5))

    def lines(self, y: Tensor) -> Tensor:
        return y @ self.gamma * 0.5


def test_a_matrix_and_a_number_of_the_code_are_no_candidates() -> None:
    applied = fold(MatrixOfItsOwn)
    assert not applied.changes and not applied.skips


class Fused(Scaled):
    """A product and a sum in one call, like the Affine of ResMLP."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.randn(4, 1, 1))

    def lines(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.gamma, y)


class FusedWithAFactor(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.beta, y, self.gamma, value=-0.5)


class FusedOnTheSum(Fused):
    """x + v c d: a shift."""

    def lines(self, y: Tensor) -> Tensor:
        return y.addcmul(self.beta, self.gamma, value=2)


class FusedTwice(Fused):
    """x + x c = (1 + c) x."""

    def lines(self, y: Tensor) -> Tensor:
        return torch.addcmul(y, y, self.gamma)


class FusedInPlace(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return y.addcmul_(self.gamma, self.beta)


class FusedQuotient(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.addcdiv(self.beta, y, self.gamma, value=3.0)


class FusedOfOneNumber(Fused):
    """The shift is one number, the scale one a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.randn(1))


class Between(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.lerp(y, self.beta, 0.3)


class BetweenByChannel(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.lerp(self.beta, y, self.gamma)


@pytest.mark.parametrize(
    "kind",
    [
        Fused, FusedWithAFactor, FusedOnTheSum, FusedTwice, FusedInPlace, FusedQuotient,
        FusedOfOneNumber, Between, BetweenByChannel,
    ],
)  # fmt: skip
def test_a_product_and_a_sum_in_one_call_fold(kind: type[Fused]) -> None:
    applied = fold(kind)
    assert len(applied.changes) == 1 and not applied.skips


class Squared(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.beta * 1.0, y, y)


class Under(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.addcdiv(self.beta, self.gamma, y.abs() + 1)


class ByItself(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.lerp(self.beta, y, y)


class OfTwo(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return torch.addcmul(y, y.sigmoid(), self.gamma)


class FusedNumbers(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))


class IntoTheShift(Fused):
    def lines(self, y: Tensor) -> Tensor:
        return self.beta.detach().addcmul_(self.gamma.mean(), self.gamma) + y


class FusedWider(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Squared, "multiplies the value by itself"),
        (Under, "divides a constant by the value"),
        (ByItself, "multiplies the value by itself"),
        (OfTwo, "combines two values with the constant in one call"),
        (FusedNumbers, "one number for all channels"),
        (FusedWider, "4 numbers for 1 channels"),
    ],
)
def test_a_product_and_a_sum_that_are_no_map_leave_their_reason(
    kind: type[Fused], reason: str
) -> None:
    applied = fold(kind)
    assert not applied.changes
    assert any(reason in skip.reason for skip in applied.skips), applied.skips


def test_a_constant_that_is_written_into_by_one_call_stays() -> None:
    model = IntoTheShift().double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert not apply_pass(FoldNorm(), copy.deepcopy(model), (x,)).changes


class Contracted(Scaled):
    """A product per channel, spelled as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4) + 0.5)

    def lines(self, y: Tensor) -> Tensor:
        return torch.einsum("nchw, c -> nchw", y, self.gamma)


class ContractedBehind(Contracted):
    def lines(self, y: Tensor) -> Tensor:
        return torch.einsum("c,...chw->...chw", self.gamma, y)


class ContractedOfAList(Contracted):
    def lines(self, y: Tensor) -> Tensor:
        return torch.functional.einsum("nchw,c->nchw", [y, self.gamma])


class Indexed(Scaled):
    """Rows of a table, chosen by a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.register_buffer("rows", torch.tensor([5, 0, 0, 3]))

    def lines(self, y: Tensor) -> Tensor:
        return y * self.gamma[self.rows]


@pytest.mark.parametrize("kind", [Contracted, ContractedBehind, ContractedOfAList, Indexed])
def test_other_spellings_of_a_product_fold(kind: type[Scaled]) -> None:
    applied = fold(kind)
    assert len(applied.changes) == 1 and not applied.skips


class Summed(Contracted):
    def lines(self, y: Tensor) -> Tensor:
        return torch.einsum("nchw,c->nhw", y, self.gamma)[:, None].expand(-1, 4, -1, -1)


class Permuted(Contracted):
    """The output's axes are in another order: the scale is not of what stands there."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(5) + 0.5)

    def lines(self, y: Tensor) -> Tensor:
        return torch.einsum("nchw,h->ncwh", y, self.gamma)


class Traced(Contracted):
    """Of the channels as rows and columns, the diagonal."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).mean((2, 3))
        return torch.einsum("cc,c->c", y.T @ y, self.gamma)


class Larger(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        return torch.maximum(self.gamma, y)


class Power(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        return y.abs() ** self.gamma


class Clamped(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        return torch.clamp(y, -self.gamma, self.gamma)


class Chosen(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        return torch.where(y > 0, y, self.gamma)


class Softened(Scaled):
    """Made of parameters, by an operation that is not evaluated ahead of time."""

    def lines(self, y: Tensor) -> Tensor:
        return y * torch.softmax(self.gamma, 0)


class Counted(Scaled):
    def __init__(self) -> None:
        super().__init__()
        del self.gamma
        self.register_buffer("gamma", torch.arange(1, 5).view(4, 1, 1))


class Written(Scaled):
    """The constant is another one at the next call."""

    def __init__(self) -> None:
        super().__init__()
        del self.gamma
        self.register_buffer("gamma", torch.ones(4, 1, 1))

    def lines(self, y: Tensor) -> Tensor:
        self.gamma.add_(1)
        return y * self.gamma


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Summed, "is a product of matrices, or sums over an axis"),
        (Permuted, "is a product of matrices, or sums over an axis"),
        (Traced, "is a product of matrices, or sums over an axis"),
        (Larger, "takes the larger of the value and the constant"),
        (Power, "takes a power"),
        (Clamped, "bends the value at the constant"),
        (Chosen, "chooses between the value and the constant"),
        (Softened, "the constant is computed by softmax, which folding does not evaluate"),
        (Counted, "the constant is not of floating point"),
        (Written, "the forward writes gamma or makes it anew, so it is no constant"),
    ],
)
def test_what_else_is_done_with_a_constant_leaves_its_reason(
    kind: type[Scaled], reason: str
) -> None:
    applied = fold(kind)
    assert not applied.changes
    assert [reason in skip.reason for skip in applied.skips] == [True], applied.skips


class Multiplied(Scaled):
    """A layer whose weight is a bare parameter is a layer, and joined tokens are no product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))

    def lines(self, y: Tensor) -> Tensor:
        y = nn.functional.conv2d(y, self.weight, self.bias)
        return torch.cat([y, self.gamma.expand(2, 4, 1, 5)], 2)


def test_a_layer_and_a_concatenation_are_no_candidates() -> None:
    applied = fold(Multiplied)
    assert not applied.changes and not applied.skips


@torch.fx.wrap
def attends(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias).relu()


@torch.fx.wrap
def scales(x: Tensor, gamma: Tensor) -> Tensor:
    return x * gamma


class ALayerOfItsOwn(Scaled):
    """A function that torch.fx does not enter gets a matrix, and a bias per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Conv2d(4, 4, 1)

    def lines(self, y: Tensor) -> Tensor:
        return attends(y, self.own.weight, self.own.bias)


class AScaleOfItsOwn(Scaled):
    def lines(self, y: Tensor) -> Tensor:
        return scales(y, self.gamma)


def test_the_bias_of_an_unknown_layer_is_no_candidate_and_an_unknown_scale_is() -> None:
    assert not fold(ALayerOfItsOwn).skips
    (skip,) = fold(AScaleOfItsOwn).skips
    assert skip.reason == "scales is not an operation that folding knows"


class AfterNorm1d(nn.Module):
    """A norm whose output has two axes or three, times a constant of a number of axes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bn, self.gamma = nn.BatchNorm1d(2), nn.Parameter(torch.rand(shape) + 0.5)
        self.conv = nn.Conv1d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x) * self.gamma)


@pytest.mark.parametrize(("example", "folds"), [(None, False), ((3, 2, 5), True), ((2, 2), False)])
def test_a_constant_may_give_a_value_more_axes_than_are_known(
    example: tuple[int, ...] | None, folds: bool
) -> None:
    model = AfterNorm1d(2, 1).double().eval()
    if example == (2, 2):
        model = AfterNorm1d(2, 1, 1).double().eval()  # the product has three axes
        model.conv = nn.Conv2d(2, 4, 1).double()
    given = () if example is None else (torch.randn(example, dtype=torch.float64),)
    applied = apply_pass(FoldNorm(), copy.deepcopy(model), given)
    assert ("gamma" in [change.target for change in applied.changes]) == folds
    x = torch.randn(example or (2, 2, 3), dtype=torch.float64)
    torch.testing.assert_close(applied.model(x), model(x), rtol=1e-12, atol=1e-12)


class Overlapping(Scaled):
    """A view that holds each of the inner channels twice: a write scales those twice."""

    def __init__(self, overlaps: bool) -> None:
        super().__init__()
        self.overlaps = overlaps
        self.two = nn.Conv2d(3 if overlaps else 4, 2, 1)
        self.gamma = nn.Parameter(torch.rand(*((3, 1, 1, 1) if overlaps else (4, 1, 1))) + 0.5)

    def lines(self, y: Tensor) -> Tensor:
        y = (y.unfold(1, 2, 1) if self.overlaps else y).mul_(self.gamma)
        return y.sum(-1) if self.overlaps else y


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_write_into_a_view_that_overlaps_is_no_map(overlaps: bool) -> None:
    model = Overlapping(overlaps).double().eval()
    applied = apply_pass(FoldNorm(), copy.deepcopy(model), (torch.randn(2, 3, 4, 4).double(),))
    assert bool(applied.changes) != overlaps
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(applied.model(x), model(x), rtol=1e-12, atol=1e-12)
