"""Which layers absorb the map of a norm, in which order, and what that relies on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_
from passes import FoldNorm
from rewrite.fold.candidates import sources
from rewrite.fold.folder import Fold, Folder
from rewrite.graph.capture import capture
from rewrite.outcomes import Declined


def decided(model: nn.Module, **options: bool) -> list[Fold | Declined]:
    randomize_norms_(model)
    captured = capture(model.double().eval(), example_inputs=torch.randn(2, 3, 8, 8).double())
    folder = Folder(captured, **options)
    return [folder.decide(source) for source in sources(folder.planner)]


def parts(fold: Fold | Declined) -> list[tuple[str, tuple[str, ...]]]:
    assert isinstance(fold, Fold), fold
    return [(move.part, move.absorption.layers) for move in fold.moves]


def conv(inputs: int, outputs: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **options)


def bn() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3)


def test_what_produces_x_is_asked_first() -> None:
    (fold,) = decided(nn.Sequential(conv(3, 3), bn(), conv(3, 3)))
    assert parts(fold) == [("both", ("0",))]


def test_what_reads_y_is_asked_second() -> None:
    (fold,) = decided(nn.Sequential(bn(), conv(3, 3)))
    assert parts(fold) == [("both", ("1",))]


class PadsBehind(nn.Module):
    """The reader pads with zeros: it takes the scale and no shift."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = bn(), conv(3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(torch.tanh(x)))


def test_a_reader_that_pads_takes_no_shift_and_the_norm_is_declined() -> None:
    (declined,) = decided(PadsBehind())
    assert isinstance(declined, Declined) and declined.reason and declined.nodes


def test_a_scale_that_passes_a_relu_has_to_be_positive() -> None:
    model = nn.Sequential(conv(3, 3), nn.ReLU(), bn(), conv(3, 3, padding=1))
    with torch.no_grad():
        model[2].bias.zero_()
    captured = capture(model.double().eval(), example_inputs=torch.randn(2, 3, 8, 8).double())
    model[2].running_mean.zero_()
    for sign, kind in ((1, Fold), (-1, Fold)):
        with torch.no_grad():
            model[2].weight.fill_(2.0 * sign)
        folder = Folder(captured)
        (source,) = sources(folder.planner)
        found = folder.decide(source)
        assert isinstance(found, kind)
        assert found.requirements.positive is (found.layers == ("0",) and sign > 0)
        assert not found.requirements.adds and found.requirements.scales


def test_a_folded_norm_is_passed_through_by_the_next() -> None:
    first, second = decided(nn.Sequential(conv(3, 3), bn(), bn()))
    assert parts(first) == [("both", ("0",))] == parts(second)


def test_a_map_that_is_not_finite_is_blamed_on_its_tensor() -> None:
    model = nn.Sequential(conv(3, 3), bn()).double().eval()
    model[1].running_var[1] = -1.0
    folder = Folder(capture(model))
    (source,) = sources(folder.planner)
    declined = folder.decide(source)
    assert isinstance(declined, Declined)
    assert "not finite" in declined.reason and "1.running_var" in declined.reason


class TwoReaders(nn.Module):
    """Behind the norm one value has a reader that cannot absorb its map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.left = conv(3, 3), bn(), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.left(self.bn(x)) + torch.tanh(self.left(x))


def test_another_reader_of_the_input_declines_the_way_back() -> None:
    (declined,) = decided(TwoReaders())
    assert isinstance(declined, Declined) and declined.reason


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 3), bn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn(self.conv(x))).mean() + torch.tanh(self.conv(x))


def test_a_layer_that_is_called_elsewhere_too_is_cloned_only_if_allowed() -> None:
    (declined,) = decided(Shared())
    assert isinstance(declined, Declined)
    (fold,) = decided(Shared(), unshare=True)
    assert isinstance(fold, Fold)


class WritesBehind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 3), bn()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.bn(x)
        y.add_(1)
        return torch.tanh(x) * 0 + y


def test_an_output_that_is_written_while_the_input_is_read_cannot_become_it() -> None:
    (declined,) = decided(WritesBehind())
    assert isinstance(declined, Declined) and "would be one value" in declined.reason


def test_a_norm_that_does_nothing_needs_no_layer() -> None:
    model = nn.Sequential(nn.ReLU(), bn(), nn.Softmax(1)).double().eval()
    model[1].eps = 0.0
    folder = Folder(capture(model))
    (source,) = sources(folder.planner)
    fold = folder.decide(source)
    assert isinstance(fold, Fold) and fold.moves == () and fold.layers == ()


@pytest.mark.parametrize("reader", [conv(3, 3), nn.Softmax(1)])
def test_a_refusal_of_layers_alone_is_sure_and_one_of_code_is_not(reader: nn.Module) -> None:
    model = nn.Sequential(nn.ReLU(), bn(), reader).double().eval()
    randomize_norms_(model)
    folder = Folder(capture(model, example_inputs=torch.randn(2, 3, 8, 8).double()))
    (source,) = sources(folder.planner)
    found = folder.decide(source)
    if isinstance(reader, nn.Softmax):
        assert isinstance(found, Declined) and folder.is_unsure(source, found)
    else:
        assert isinstance(found, Fold)


def tracked(axes: int) -> nn.Module:
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d)[axes - 1]
    return kind(4, affine=True, track_running_stats=True)


class Turned(nn.Module):
    """A norm, and a linear layer that reads another axis of it."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.norm, self.head, self.axis = tracked(2), nn.Linear(4, 4), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).transpose(self.axis, -1))


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "the linear layer reads positions": (
        lambda: nn.Sequential(tracked(1), nn.Linear(4, 4)), 2, False,
    ),
    "the linear layer reads rows": (lambda: Turned(1), 3, False),
    "the linear layer reads channels": (lambda: Turned(0), 3, True),
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), tracked(2)), 3, True),
}  # fmt: skip


@pytest.mark.parametrize("name", UNBATCHED)
def test_an_instance_norm_without_a_batch_has_its_channels_first(name: str) -> None:
    make, axes, folds = UNBATCHED[name]
    model = randomize_norms_(make()).double().eval()
    x = torch.randn((4,) * axes, dtype=torch.float64)
    for fold in (FoldNorm(), FoldNorm(leftover="affine")):
        result = rewrite.convert(model, fold, example_inputs=x, verify=False)
        assert (result.model(3 * x) - model(3 * x)).abs().max() < 1e-12
        words = [change.after for change in result.report.changes]
        assert any("folded into" in word for word in words) is folds


class Bits(nn.Module):
    """A norm of the bits of a value, and a linear layer along another axis."""

    def __init__(self, bits: bool) -> None:
        super().__init__()
        self.bits = bits
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.norm(x.view(torch.int64).double() * 1e-18 if self.bits else x))


@pytest.mark.parametrize("bits", [False, True])
def test_a_view_as_another_dtype_lists_no_sizes(bits: bool) -> None:
    model = randomize_norms_(Bits(bits)).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    result = rewrite.convert(model, FoldNorm(), verify=False)
    assert not result.report.changes
    assert torch.equal(result.model(x), model(x))


class WithoutGradients(nn.Module):
    """A convolution under `no_grad`, and a norm that is trained behind it."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.inside = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), inside

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
            if self.inside:
                y = self.norm(y)
        return y if self.inside else self.norm(y)


@pytest.mark.parametrize(("inside", "trained"), [(False, True), (False, False), (True, True)])
def test_a_norm_stays_whose_output_would_lose_its_gradients(inside: bool, trained: bool) -> None:
    model = randomize_norms_(WithoutGradients(inside=inside)).eval().requires_grad_(trained)
    x = torch.randn(2, 3, 4, 4)
    result = rewrite.convert(model, ["fold"], example_inputs=x)
    assert result.model(x).requires_grad is model(x).requires_grad
    assert bool(result.report.changes) is (inside or not trained)
    if not result.report.changes:
        assert "conv runs without gradients" in result.report.skips[0].reason
