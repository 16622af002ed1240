"""rewrite.training.PathSGD: κ against its definition, and steps that commute with rescaling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.path_norm import network
from models import randomize_norms_
from rewrite.errors import CaptureError, OptionError
from rewrite.training import PathSGD


def convolutional(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)]
    return randomize_norms_(nn.Sequential(*layers).double())


def rescale_(model: nn.Sequential) -> nn.Sequential:
    """Scale the channels behind the first convolution, and those behind the second."""
    torch.manual_seed(7)
    first, second = torch.exp(torch.randn(6).double()), torch.exp(torch.randn(5).double())
    writer = model[1] if isinstance(model[1], nn.BatchNorm2d) else model[0]
    with torch.no_grad():
        writer.weight.mul_(first.view(-1, *(1,) * (writer.weight.dim() - 1)))
        writer.bias.mul_(first)
        model[4].weight.mul_(second.view(-1, 1, 1, 1) / first.view(1, -1, 1, 1))
        model[4].bias.mul_(second)
        model[7].weight.div_(second.repeat_interleave(4).view(1, -1))
    return model


X = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> nn.Module:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    return model


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(X), LABELS))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", [False, True])
def test_an_update_commutes_with_rescaling(momentum: float, norm: bool) -> None:
    plain, scaled = convolutional(norm).eval(), rescale_(convolutional(norm)).eval()
    torch.testing.assert_close(outputs(plain), outputs(scaled), rtol=1e-12, atol=1e-12)
    for model in (plain, scaled):
        train(model, PathSGD(model, lr=2.0, momentum=momentum, example_inputs=X))
    moved = convolutional(norm).eval()
    assert (outputs(plain) - outputs(moved)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(plain), outputs(scaled), rtol=1e-10, atol=1e-10)
    expected = rescale_(plain)
    for one, other in zip(expected.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_an_update_of_sgd_does_not() -> None:
    plain, scaled = convolutional(), rescale_(convolutional())
    for model in (plain, scaled):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (outputs(plain) - outputs(scaled)).abs().max() > 1e-3


def test_state_dict_goes_on_where_it_was() -> None:
    one, other = convolutional(), convolutional()
    optimizer = PathSGD(one, lr=1.0, momentum=0.9, example_inputs=X)
    train(one, optimizer, 2)
    other.load_state_dict(one.state_dict())
    resumed = PathSGD(other, lr=5.0, example_inputs=X)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(one, optimizer, 2), train(other, resumed, 2)
    torch.testing.assert_close(outputs(one), outputs(other), rtol=0, atol=0)


def test_groups_have_their_own_steps() -> None:
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4].parameters()}]
    train(model, PathSGD(model, groups, lr=1.0, example_inputs=X), 1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"4.weight", "4.bias"}


def test_a_dead_unit_stays_and_the_loss_falls() -> None:
    model = convolutional()
    with torch.no_grad():
        model[4].weight[:, 0] = 0
    optimizer = PathSGD(model, lr=0.05, example_inputs=X)
    first = loss_of(model)
    dead = model[0].weight[0].clone()
    train(model, optimizer, 1)
    assert torch.equal(model[0].weight[0], dead)
    train(model, optimizer, 30)
    assert loss_of(model) < first / 2


def test_trains_norms_in_train_mode_and_leaves_the_mode_alone() -> None:
    model = convolutional(norm=True).train()
    train(model, PathSGD(model, lr=1.0, example_inputs=X), 2)
    assert all(module.training for module in model.modules())
    assert outputs(model).isfinite().all()


def test_interval_reuses_kappa() -> None:
    model = convolutional()
    optimizer = PathSGD(model, lr=1.0, interval=2, example_inputs=X)
    train(model, optimizer, 1)
    held = optimizer._kappa
    train(model, optimizer, 1)
    assert optimizer._kappa is held
    train(model, optimizer, 1)
    assert optimizer._kappa is not held


def test_refuses_what_is_not_homogeneous_and_numbers_out_of_range() -> None:
    with pytest.raises(CaptureError, match="tanh is not positively homogeneous"):
        PathSGD(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), lr=1.0, example_inputs=torch.ones(1, 2))
    for options in ({"lr": -1.0}, {"lr": 1.0, "momentum": 1.0}, {"lr": 1.0, "interval": 0}):
        with pytest.raises(OptionError, match="pass lr"):
            PathSGD(convolutional(), example_inputs=X, **options)


def test_refuses_a_gradient_of_a_parameter_on_no_path() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.extra = nn.Linear(2, 2), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Extra()
    optimizer = PathSGD(model, lr=1.0, example_inputs=torch.ones(1, 2))
    (model(torch.ones(1, 2)).sum() + model.extra.sum()).backward()
    with pytest.raises(OptionError, match="on no path"):
        optimizer.step()


# -- the finding of Neyshabur et al. 2015 ---------------------------------------------------------


def trained_loss(balanced: bool, make: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """Return the loss of 400 digits after 40 steps."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data[:400]).double() / 16, torch.tensor(digits.target[:400])
    model = network(64, 32, balanced=balanced).double()
    optimizer = make(model)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def test_sgd_is_crippled_by_an_unbalanced_start_and_path_sgd_does_not_notice() -> None:
    steps = (1e-4, 1e-3, 0.01, 0.1, 0.5)
    sgd = {
        balanced: [
            trained_loss(balanced, lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr))
            for lr in steps
        ]
        for balanced in (True, False)
    }
    path = [
        trained_loss(balanced, lambda m: PathSGD(m, lr=1.0, example_inputs=torch.zeros(1, 64)))
        for balanced in (True, False)
    ]
    assert min(sgd[True]) < 0.2 and min(sgd[False]) > 1.5  # ln 10 = 2.3 is a guess
    assert path[0] < 0.2 and path[1] == pytest.approx(path[0], rel=1e-6)
