"""passes.fold through the whole of `convert`: which tensors a fold may change, and no others.

Each model folds and its conversion is right; the twins hold the check of untouched tensors to what
it is for, and decline the one site that cannot be folded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import rewrite
from passes import FoldNorm
from rewrite.equivalence.verify import check_untouched
from rewrite.runtime.copying import copy_model

IMAGE = torch.linspace(-2, 2, 2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8)
TOKENS = torch.linspace(-2, 2, 2 * 5 * 8, dtype=torch.float64).view(2, 5, 8).sin()


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Scaled(nn.Module):
    """A residual block with a scale per channel: a bare parameter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(3, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(x)


class Standardized(nn.Module):
    """The mean and scale of the data, as buffers of the model."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std)


class WithConstant(nn.Module):
    """An edited forward that makes a tensor of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        b = self.bn
        assert b.running_mean is not None and b.running_var is not None
        y = F.batch_norm(self.conv(x), b.running_mean, b.running_var, b.weight, b.bias, False)
        return torch.maximum(y, torch.tensor(0.0))


class Held(nn.Module):
    """Scales by a parameter that another, never called module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = nn.Module()
        self.holder.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.holder.other = nn.Parameter(torch.rand(4, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.holder.scale
        return y * torch.tanh(y + self.holder.other.abs().max())


class Unused(nn.Module):
    """A norm in training mode that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.unused = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("model", "inputs", "target"),
    [
        (nn.Sequential(RMSNorm(8), nn.Linear(8, 3)), TOKENS, "0.weight"),
        (nn.Sequential(nn.Linear(8, 8), RMSNorm(8), nn.Linear(8, 3)), TOKENS, "1.weight"),
        (Scaled(), IMAGE, "gamma"),
        (nn.Sequential(Scaled(), Scaled()), IMAGE, "1.gamma"),
        (Standardized(), IMAGE, ""),
        (Held(), IMAGE, "holder.scale"),
        (Unused(), IMAGE, "bn"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_a_fold_takes_away_is_no_violation(model, inputs, target, dtype) -> None:
    model = models.randomize_norms_(model).to(dtype).eval()
    if isinstance(model, Unused):
        model.unused.train()
    inputs = inputs.to(dtype)
    result = rewrite.convert(model, FoldNorm(), example_inputs=inputs)
    assert target in {change.target for change in result.report.changes}
    assert result.report.passes[0].violations == ()
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    with torch.inference_mode():
        assert (result.model(inputs) - model(inputs)).abs().max() < bound
        assert (result.model(100 * inputs) - model(100 * inputs)).abs().max() < 100 * bound


def test_a_forward_that_makes_a_tensor_is_folded_right_or_declined_with_the_reason() -> None:
    model = models.randomize_norms_(WithConstant()).double().eval()
    result = rewrite.convert(model, FoldNorm(), example_inputs=IMAGE)
    assert result.report.ok and (result.model(IMAGE) - model(IMAGE)).abs().max() < 1e-12
    reasons = [skip.reason for skip in result.report.skips if "batch_norm" in skip.before]
    assert result.report.changes or "makes a tensor of its own" in reasons[0]


def test_a_tensor_beside_the_one_that_is_named_may_not_change() -> None:
    model = Held()
    other = copy_model(model)
    with torch.no_grad():
        other.holder.scale += 1
    assert check_untouched(model, other, {"holder.scale"}) == []
    assert check_untouched(model, other, {"conv"}) == ["holder.scale"]
    with torch.no_grad():
        other.holder.other += 1
    assert check_untouched(model, other, {"holder.scale"}) == ["holder.other"]


class Masked(nn.Conv2d):
    """A convolution whose weight a property computes: a pruning mask."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.raw = self._parameters.pop("weight")
        self.register_buffer("mask", (torch.rand_like(self.raw) > 0.3).to(self.raw))

    @property
    def weight(self) -> Tensor:
        return self.raw * self.mask


class Doubled(nn.Conv2d):
    """A convolution that computes its weight where it is looked up."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self._parameters["weight"])  # the one looked up is another tensor
        nn.init.uniform_(self._parameters["bias"])

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "weight" else found


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("kind", "how"), [(Masked, "a property"), (Doubled, "__getattr__")])
def test_a_weight_that_code_computes_costs_its_own_sites_alone(
    kind: type[nn.Conv2d], how: str, verify: bool
) -> None:
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), kind(3, 4, 3), nn.BatchNorm2d(4)]
    model = models.randomize_norms_(nn.Sequential(*layers)).double().eval()
    result = rewrite.convert(model, "fold", example_inputs=IMAGE, verify=verify)
    assert [change.target for change in result.report.changes] == ["1"]
    (skip,) = result.report.skips
    assert skip.target == "4" and f"computes its weight by {how}" in skip.reason
    assert (result.model(IMAGE) - model(IMAGE)).abs().max() < 1e-12
    layers[3] = nn.Conv2d(3, 4, 3)
    model = models.randomize_norms_(nn.Sequential(*layers)).double().eval()
    assert len(rewrite.convert(model, "fold", example_inputs=IMAGE).report.changes) == 2
