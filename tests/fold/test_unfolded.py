"""What folding leaves: a norm as one multiply-add, and a norm without its affine part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_
from passes import FoldNorm
from rewrite.fold.unfolded import drop_affine_part
from rewrite.graph.capture import capture
from rewrite.nn.modules import ChannelAffine


def between_activations() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Softmax(1))
    return randomize_norms_(model).double().eval()


def test_a_norm_that_nothing_absorbs_becomes_one_multiply_add() -> None:
    model, x = between_activations(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = rewrite.convert(model, FoldNorm(leftover="affine"), example_inputs=x)
    layer = result.model[2]
    assert isinstance(layer, ChannelAffine)
    assert (result.model(x) - model(x)).abs().max() < 1e-13
    norm = model[2]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(layer.weight, scale)
    torch.testing.assert_close(layer.bias, norm.bias - norm.running_mean * scale)


def test_the_change_says_why_and_where_each_tensor_went() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = rewrite.convert(between_activations(), FoldNorm(leftover="affine"), example_inputs=x)
    (change,) = result.report.changes
    assert change.target == "2" and change.after == "one multiply-add, 2" and change.note
    assert change.keys == {
        "2.weight": "2.weight", "2.bias": "2.bias", "2.running_mean": None, "2.running_var": None,
        "2.num_batches_tracked": None,
    }  # fmt: skip
    assert change.recipe["do"] == "affine" and change.recipe["name"] == "2"


@pytest.mark.parametrize("trains", [True, False])
def test_the_multiply_add_trains_as_the_norm_did(trains: bool) -> None:
    model, x = between_activations(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model[2].requires_grad_(trains)
    made = rewrite.convert(model, FoldNorm(leftover="affine"), example_inputs=x).model
    assert [p.requires_grad for p in made[2].parameters()] == [trains, trains]


def test_by_default_the_norm_stays() -> None:
    model, x = between_activations(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = rewrite.convert(model, FoldNorm(), example_inputs=x)
    assert type(result.model[2]) is nn.BatchNorm2d and result.report.skips


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
def test_a_norm_without_its_affine_part_normalizes_as_before(norm: nn.Module) -> None:
    randomize_norms_(norm)
    model = nn.Sequential(norm).double().eval()
    weight, bias = norm.weight.detach().clone(), getattr(norm, "bias", None)
    x = torch.randn(3, 4, dtype=torch.float64)
    want = model(x)
    drop_affine_part(capture(model), "0")
    assert type(model[0]) is type(norm) and dict(model.named_parameters()) == {}
    made = model(x) * weight + (0 if bias is None else bias)
    torch.testing.assert_close(made, want)
    assert (model(x) - want).abs().max() > 1e-3


class Lines(nn.Module):
    """A norm that a line calls, its parameters under names of their own, and the layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.ParameterList([nn.Parameter(torch.rand(4) + 0.5)])
        self.norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, (4,), self.gain[0], self.norm.bias), self.weight)


class Subclass(nn.LayerNorm):
    """A norm with code of its own, which asks whether it has a weight."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        return F.layer_norm(x, (4,), self.weight, self.bias)


class Root(nn.Module):
    """Lines of the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.group_norm(x, 2, self.gain, self.shift))


class Asks(nn.Module):
    """A parent that asks a layer of torch whether it has a weight."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        self.flag = flag
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x) if self.norm.weight is not None else x)


class AsksTheFlag(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x) if self.norm.elementwise_affine else x)


KEEPING: dict[str, Callable[[], nn.Module]] = {
    "a line": Lines,
    "a subclass": lambda: nn.Sequential(Subclass(4), nn.Linear(4, 4)),
    "the root": Root,
    "a parent that asks": lambda: Asks(True),
    "a parent that asks for the flag": lambda: AsksTheFlag(True),
}


@pytest.mark.parametrize("name", KEEPING)
def test_a_norm_that_code_reads_keeps_tensors_that_do_nothing(name: str) -> None:
    """Lines go on reading what they name: it is neither left as it was nor taken away."""
    model = randomize_norms_(KEEPING[name]()).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
    (change,) = result.report.changes
    assert "it stays, and does nothing" in change.note and not change.keys
    assert result.model.state_dict().keys() >= model.state_dict().keys()
    torch.testing.assert_close(result.model(3 * x), model(3 * x), rtol=1e-11, atol=1e-11)
    again = rewrite.convert(result.model, "fold", example_inputs=x, verify=False).report
    assert not again.changes
    assert any("does nothing already" in skip.reason for skip in again.skips)


def test_a_layer_that_nobody_asks_does_without_them() -> None:
    model = randomize_norms_(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x)
    assert result.model[0].weight is None and not result.report.changes[0].note


class Chooses(nn.Module):
    """A norm of lines, which a forward that cannot be traced calls as well."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(Inner()), nn.Linear(4, 4)
        self.other = Branch(self.inner[0] if both else Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.head(self.inner(x)))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (4,), self.gain)


class Branch(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("both", [False, True])
def test_a_norm_of_lines_stays_where_untraced_code_may_call_it(both: bool) -> None:
    model, x = Chooses(both).double().eval(), torch.randn(2, 4, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
    torch.testing.assert_close(result.model(3 * x), model(3 * x), rtol=1e-11, atol=1e-11)
    assert bool(result.report.changes) is not both


class Plain(nn.Module):
    """A functional norm that nothing absorbs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias).exp()


class InContext(Plain):
    """The same on a line that cannot be edited."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        with torch.no_grad():
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias).exp()


@pytest.mark.parametrize("kind", [Plain, InContext])
def test_a_line_that_cannot_be_edited_becomes_no_multiply_add(kind: type[nn.Module]) -> None:
    model = randomize_norms_(kind()).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    fold = FoldNorm(leftover="affine")
    report = rewrite.convert(model, fold, example_inputs=x, verify=False).report
    assert len(report.changes) == (kind is Plain)
    assert all("enters torch.no_grad()" in skip.reason for skip in report.skips)
    assert not any("breaks" in skip.reason for skip in report.skips)


class OneTensor(nn.Module):
    """Norms on lines whose bias may be their weight."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.gain if self.both else self.shift
        return self.conv(F.group_norm(x, 2, self.gain, shift))


class Absorbing(OneTensor):
    def forward(self, x: Tensor) -> Tensor:
        shift = self.gain if self.both else self.shift
        return self.norm(F.group_norm(x.exp(), 2, self.gain, shift)).exp()


@pytest.mark.parametrize("kind", [OneTensor, Absorbing])
@pytest.mark.parametrize("both", [False, True])
def test_one_tensor_as_weight_and_bias_stays_as_it_is(kind: type[OneTensor], both: bool) -> None:
    model = randomize_norms_(kind(both)).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
    torch.testing.assert_close(result.model(2 * x), model(2 * x), rtol=1e-11, atol=1e-11)
    assert bool(result.report.changes) is not both
