"""passes.Rebalance: the same function, balanced weights, and what is declined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from models import randomize_norms_
from passes import Rebalance
from rewrite.errors import OptionError
from rewrite.fold.replay import apply_recipes
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model

RIGHT, WRONG = 1e-12, 1e-3
OBJECTIVES = ("path", "l2", "equalize")


class Optional(nn.Module):
    """An input at its default, further ones, and what no trace follows."""

    def __init__(self, followed: bool) -> None:
        super().__init__()
        self.one, self.two, self.followed = nn.Linear(4, 6), nn.Linear(6, 3), followed

    def forward(self, x, scale=None, y=None, **kwargs):
        x = x if self.followed or float(x.sum()) > 1e9 else 1 * x
        x = torch.relu(self.one(x))
        return self.two(x)


@pytest.mark.parametrize("followed", [True, False])
def test_the_path_objective_needs_no_value_of_an_input_at_its_default(followed):
    torch.manual_seed(0)
    model, x = Optional(followed).double().eval(), torch.randn(2, 4, dtype=torch.float64)
    result = rewrite.convert(model, Rebalance(objective="path"), example_inputs=x)
    if followed:
        assert len(result.report.changes) == 1
        assert error(model, result.model, x) < RIGHT
    else:
        reasons = [skip.reason for skip in result.report.skips]
        assert not result.report.changes and not any("unknown" in reason for reason in reasons)
        assert any("was not traced" in reason for reason in reasons)


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        left, right = a(x), b(x)
    return float((left - right).abs().max() / left.abs().max())


def unbalance_(*layers: nn.Module) -> None:
    """Scale the rows of layers by random factors: another function, badly balanced."""
    with torch.no_grad():
        for layer in layers:
            shape = (-1, *(1,) * (layer.weight.dim() - 1))
            layer.weight.mul_(torch.exp(1.5 * torch.randn(layer.weight.shape[0])).view(shape))


class Residual(nn.Module):
    """A stream of 8 channels with an inner branch and a concatenation at the end."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.outer = nn.Conv2d(6, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(12, 5, 1, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.outer(F.leaky_relu(self.inner(x)))
        y = self.norm(self.depthwise(F.max_pool2d(x, 2)))
        y = self.up(torch.relu_(y))
        return self.head(torch.cat([y, F.avg_pool2d(x, 1)], 1))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(torch.relu(self.grouped(torch.relu(self.conv(x)))), 1)
        return self.fc2(torch.relu(self.fc1(x)))


class Gated(nn.Module):
    """Squeeze and excitation: the gate keeps its scale, what it multiplies has one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.last(x * torch.sigmoid(gate))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "norms": lambda: Residual(norm=True),
    "flattened": Flattened,
    "gated": Gated,
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomize_norms_(MODELS[name]())
    kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    unbalance_(*kernels)
    size = 8
    return model.double().eval(), torch.randn(2, 3, size, size, dtype=torch.float64)


def rebalanced(model: nn.Module, x: Tensor, **options: str) -> rewrite.Result[nn.Module]:
    return rewrite.convert(model, [Rebalance(**options)], example_inputs=(x,))


CASES = [
    (name, objective)
    for name in MODELS
    for objective in OBJECTIVES
    if (name, objective) != ("gated", "path")
]


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_the_function_stays_and_a_second_time_changes_nothing(name: str, objective: str) -> None:
    model, x = build(name)
    result = rebalanced(model, x, objective=objective)
    assert result.report.ok and result.report.changes
    assert error(model, result.model, x) < RIGHT
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert not rebalanced(result.model, x, objective=objective).report.changes
    model.train(), result.model.train()
    assert error(model, result.model, x) < RIGHT


def test_every_kind_of_layer_of_the_residual_network_is_scaled() -> None:
    model, x = build("norms")
    changes = rebalanced(model, x, objective="l2").report.changes
    assert {change.target for change in changes} == {"stem", "inner", "norm", "up"}
    stream = next(change for change in changes if change.target == "stem")
    assert set(stream.touched) == {"stem", "outer", "inner", "depthwise", "head"}


# -- the fixed points -----------------------------------------------------------------------------


def rows_and_columns(model: nn.Sequential, power: float) -> tuple[Tensor, Tensor]:
    first, last = model[0].weight.abs() ** power, model[2].weight.abs() ** power
    return first, last


def two_layers() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    unbalance_(model[0])
    return model, torch.randn(5, 4, dtype=torch.float64)


def test_l2_reaches_the_least_sum_of_squares() -> None:
    model, x = two_layers()
    after = rebalanced(model, x, objective="l2").model
    first, last = rows_and_columns(after, 2)
    torch.testing.assert_close(first.sum(1), last.sum(0), rtol=1e-9, atol=0)
    # The minimum over all rescalings, in closed form: 2 Σ_u ||w_u|| ||v_u||.
    rows, columns = rows_and_columns(model, 2)
    least = 2 * (rows.sum(1) * columns.sum(0)).sqrt().sum()
    torch.testing.assert_close(first.sum() + last.sum(), least, rtol=1e-12, atol=0)
    assert least < 0.9 * (rows.sum() + columns.sum())


def test_equalize_gives_both_sides_one_range() -> None:
    model, x = two_layers()
    first, last = rows_and_columns(rebalanced(model, x, objective="equalize").model, 1)
    torch.testing.assert_close(first.amax(1), last.amax(0), rtol=1e-9, atol=0)


def test_path_reaches_the_minimum_of_the_criterion() -> None:
    model, x = two_layers()

    def criterion(log_scale: Tensor, weights: nn.Sequential) -> Tensor:
        """n log Σ κ' - Σ log κ'/κ, where incoming edges have κ' = κ/d² and outgoing ones κ d²."""
        w, b, v = weights[0].weight ** 2, weights[0].bias ** 2, weights[2].weight ** 2
        d = torch.exp(2 * log_scale)
        leaving = (w.sum(1) + b) * d
        kappa = [v.sum(0)[:, None] / d[:, None] * torch.ones_like(w), v.sum(0) / d]
        kappa += [leaving[None] * torch.ones_like(v), torch.ones(3, dtype=torch.float64)]
        count = sum(part.numel() for part in kappa)
        k = 2 * log_scale * (3 - 5)  # outgoing less incoming numbers of each unit
        return count * torch.log(sum(part.sum() for part in kappa)) - k.sum()

    after = rebalanced(model, x, objective="path").model
    zero = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(criterion(zero, after), zero)
    assert slope.abs().max() < 1e-6
    (slope,) = torch.autograd.grad(criterion(zero, model), zero)
    assert slope.abs().max() > WRONG


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"objective": "l1"}, {"clipped": "maybe"}])
def test_options_are_checked(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="pass"):
        Rebalance(**options)


# -- declining ------------------------------------------------------------------------------------


def test_path_declines_a_network_that_is_not_homogeneous() -> None:
    applied = apply_pass(Rebalance(objective="path"), Gated().eval(), torch.randn(1, 3, 8, 8))
    (skip,) = applied.skips
    assert "sigmoid is not positively homogeneous" in skip.reason and not applied.changes


def test_a_site_that_is_left_out_keeps_its_scale() -> None:
    model, x = build("flattened")
    result = rewrite.convert(model, [Rebalance()], example_inputs=(x,), skip=("fc1",))
    assert {change.target for change in result.report.changes} == {"conv", "grouped"}
    assert torch.equal(result.model.fc2.weight, model.fc2.weight)
    assert error(model, result.model, x) < RIGHT


@pytest.mark.parametrize("objective", ["l2", "equalize"])
def test_an_architecture_of_torchvision_keeps_its_function_and_takes_a_replay(
    objective: str,
) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = randomize_norms_(torchvision.models.shufflenet_v2_x0_5().double()).eval()
    other = randomize_norms_(torchvision.models.shufflenet_v2_x0_5().double()).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    applied = apply_pass(Rebalance(objective=objective), copy_model(model), x)
    assert len(applied.changes) > 20
    assert error(model, applied.model, x) < 1e-12
    assert list(applied.model.state_dict()) == list(model.state_dict())
    assert not apply_pass(Rebalance(objective=objective), copy_model(applied.model), x).changes
    recipes = [change.recipe for change in applied.changes]
    before = copy_model(other)
    other.load_state_dict(apply_recipes(recipes, (), other.state_dict()))
    assert error(before, other, x) < 1e-12
    moved = [k for k, v in other.state_dict().items() if not torch.equal(v, before.state_dict()[k])]
    assert len(moved) > 40


class AuxiliaryHead(nn.Module):
    """As GoogLeNet: a head that reads a hidden value in training mode alone."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.extra = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        second = self.b(first).relu()
        out = self.c(second)
        if self.training and self.reads:
            out = out + self.extra(first if self.reads == "first" else second)
        return out


@pytest.mark.parametrize(
    ("reads", "sites"), [("", {"a", "b"}), ("first", {"b"}), ("second", {"a"})]
)
def test_a_value_that_training_reads_otherwise_keeps_its_scale(reads: str, sites: set[str]) -> None:
    torch.manual_seed(0)
    model, x = AuxiliaryHead(reads).double().eval(), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        model.a.weight.mul_(torch.logspace(-1, 1, 8, dtype=torch.float64)[:, None])
        model.b.weight.mul_(torch.logspace(1, -1, 8, dtype=torch.float64)[:, None])
    result = rewrite.convert(model, Rebalance("l2"), example_inputs=x)
    assert {change.target for change in result.report.changes} == sites
    for mode in (False, True):
        want, found = model.train(mode)(x), result.model.train(mode)(x)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
