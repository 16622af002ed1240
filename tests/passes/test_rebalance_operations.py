"""passes.Rebalance: the operations that a scale passes through, and those that stop it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from models import randomize_norms_
from passes import Rebalance
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model

RIGHT = 1e-12
OBJECTIVES = ("l2", "equalize", "path")

Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Two convolutions of 8 channels, another layer, and a forward that is given."""

    def __init__(self, body: Body, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.layer = nn.Identity() if layer is None else layer
        self.factor = nn.Parameter(torch.randn(8, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def built(body: Body, layer: Callable[[], nn.Module] | None = None) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = randomize_norms_(Net(body, layer() if layer else None)).double().eval()
    with torch.no_grad():  # badly balanced
        model.a.weight.mul_(torch.exp(2 * torch.randn(8)).view(-1, 1, 1, 1))
    return model, torch.randn(2, 3, 8, 8, dtype=torch.float64)


def values(returned: Any) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else [torch.as_tensor(v) for v in returned]


def error(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    found = 0.0
    with torch.no_grad():
        for a, b in zip(values(one(x)), values(other(x)), strict=True):
            found = max(found, float((a - b).abs().max() / a.abs().max()))
    return found


def shuffled(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def concatenated(s: Net, x: Tensor) -> Tensor:
    y = torch.relu(s.a(x))
    return s.layer(torch.cat([y, torch.relu(s.b(y)), -y], 1))


def unequal_branches(s: Net, x: Tensor) -> Tensor:
    y = torch.relu(s.a(x))
    return s.c(torch.relu(y + s.layer(torch.relu(s.b(y)))))


def shared_layer(s: Net, x: Tensor) -> Tensor:
    y = torch.relu(s.a(x))
    return s.c(torch.relu(s.b(torch.relu(s.b(y)))))


def halves(s: Net, x: Tensor) -> Tensor:
    one, other = s.a(x).chunk(2, 1)
    return s.layer(torch.maximum(one, other))


def gated(s: Net, x: Tensor) -> Tensor:
    y = torch.relu(s.a(x))
    return s.c(y * torch.sigmoid(s.layer(y.mean((2, 3), keepdim=True))))


PASSED: dict[str, tuple[Body, Callable[[], nn.Module] | None, set[str]]] = {
    "prelu": (lambda s, x: s.c(s.layer(s.a(x))), lambda: nn.PReLU(8), {"a"}),
    "prelu of negative slope": (
        lambda s, x: s.c(s.layer(s.a(x))), lambda: nn.PReLU(1, -0.7), {"a"},
    ),
    "leaky relu of negative slope": (lambda s, x: s.c(F.leaky_relu(s.a(x), -0.3)), None, {"a"}),
    "leaky relu in place": (lambda s, x: s.c(F.leaky_relu_(s.a(x), 2.0)), None, {"a"}),
    "clamp from 0": (lambda s, x: s.c(s.a(x).clamp(min=0)), None, {"a"}),
    "clamp_min": (lambda s, x: s.c(torch.clamp_min(s.a(x), 0.0)), None, {"a"}),
    "threshold at 0": (lambda s, x: s.c(F.threshold(s.a(x), 0, 0)), None, {"a"}),
    "threshold module": (lambda s, x: s.c(s.layer(s.a(x))), lambda: nn.Threshold(0, 0), {"a"}),
    "abs": (lambda s, x: s.c(s.a(x).abs()), None, {"a"}),
    "shared layer": (shared_layer, None, {"a"}),
    "channel shuffle": (
        lambda s, x: s.c(shuffled(torch.relu(s.a(x)))),
        None, {"a"},
    ),
    "channel shuffle of torch": (
        lambda s, x: s.c(F.channel_shuffle(torch.relu(s.a(x)), 4)), None, {"a"},
    ),
    "squeeze and excitation": (gated, lambda: nn.Conv2d(8, 8, 1), {"a"}),
    "depthwise with a multiplier": (
        lambda s, x: s.layer[1](torch.relu(s.layer[0](torch.relu(s.a(x))))),
        lambda: nn.ModuleList([nn.Conv2d(8, 24, 3, groups=8), nn.Conv2d(24, 2, 1)]),
        {"a", "layer.0"},
    ),
    "grouped": (
        lambda s, x: s.layer[1](torch.relu(s.layer[0](torch.relu(s.a(x))))),
        lambda: nn.ModuleList([nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)]),
        {"a", "layer.0"},
    ),
    "transposed and grouped": (
        lambda s, x: s.layer[1](torch.relu(s.layer[0](torch.relu(s.a(x))))),
        lambda: nn.ModuleList(
            [nn.ConvTranspose2d(8, 12, 3, 2, 1, 1, groups=4), nn.Conv2d(12, 2, 1)]
        ),
        {"a", "layer.0"},
    ),
    "concatenation": (concatenated, lambda: nn.Conv2d(24, 2, 1), {"a", "b"}),
    "branches of unequal length": (unequal_branches, lambda: nn.Conv2d(8, 8, 1), {"a", "b"}),
    "norm that is not folded": (
        lambda s, x: s.c(torch.relu(s.layer(s.a(x)))), lambda: nn.BatchNorm2d(8), {"layer"},
    ),
    "max pooling with padding": (
        lambda s, x: s.c(F.max_pool2d(-s.a(x), 3, 2, 1, ceil_mode=True)), None, {"a"},
    ),
    "average without padding": (
        lambda s, x: s.c(F.avg_pool2d(s.a(x), 3, 2, 1, False, False)), None, {"a"},
    ),
    "zero padding": (lambda s, x: s.c(F.pad(s.a(x), (1, 0, 2, 1))), None, {"a"}),
    "pixel shuffle": (
        lambda s, x: s.layer(F.pixel_shuffle(torch.relu(s.a(x)), 2)),
        lambda: nn.Conv2d(2, 3, 1), {"a"},
    ),
    "maximum of halves": (halves, lambda: nn.Conv2d(4, 3, 1), {"a"}),
    "both signs": (
        lambda s, x: s.layer(torch.cat([F.relu(y := s.a(x)), F.relu(-y)], 1)),
        lambda: nn.Conv2d(16, 3, 1), {"a"},
    ),
    "factor a channel": (lambda s, x: s.c(torch.relu(s.a(x) * s.factor)), None, {"a"}),
    "flattened": (
        lambda s, x: s.layer(F.adaptive_avg_pool2d(F.relu(s.a(x)), 2).flatten(1)),
        lambda: nn.Linear(32, 3), {"a"},
    ),
    "channels last": (
        lambda s, x: s.layer(F.relu(s.a(x)).permute(0, 2, 3, 1)), lambda: nn.Linear(8, 3), {"a"},
    ),
    "dropout": (lambda s, x: s.c(s.layer(F.relu(s.a(x)))), lambda: nn.Dropout2d(0.5), {"a"}),
}  # fmt: skip

NO_PATH_NORM = {"squeeze and excitation"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PASSED)
def test_a_scale_passes(name: str, objective: str) -> None:
    body, layer, wanted = PASSED[name]
    model, x = built(body, layer)
    applied = apply_pass(Rebalance(objective), copy_model(model), x)
    if objective == "path" and name in NO_PATH_NORM:
        assert not applied.changes
        assert "sigmoid is not positively homogeneous" in applied.skips[0].reason
        return
    assert {change.target for change in applied.changes} == wanted
    assert error(model, applied.model, x) < RIGHT
    assert not apply_pass(Rebalance(objective), copy_model(applied.model), x).changes
    if name not in NO_PATH_NORM:
        before = rewrite.path_norm(model, 2, x)
        assert rewrite.path_norm(applied.model, 2, x) == pytest.approx(before, rel=RIGHT)
    model.train(), applied.model.train()
    if name != "dropout":
        assert error(model, applied.model, x) < RIGHT


STOPPED: dict[str, tuple[Body, str]] = {
    "clamp from another number": (lambda s, x: s.c(s.a(x).clamp(min=0.1)), "does not commute"),
    "threshold at another number": (
        lambda s, x: s.c(F.threshold(s.a(x), 0.5, 0.0)), "does not commute",
    ),
    "maximum with a constant": (
        lambda s, x: s.c(torch.maximum(s.a(x), torch.ones(()).double())), "scale is fixed",
    ),
    "masked by its own value": (lambda s, x: s.c((y := s.a(x)) * (y > 1)), "gt is not"),
    "sign": (lambda s, x: s.c(torch.sign(s.a(x)).cumsum(1)), "rounds its values"),
    "norm of all": (lambda s, x: s.c((y := s.a(x)) / y.norm()), "does not commute"),
    "softmax": (lambda s, x: s.c(s.a(x).softmax(1)), "does not commute"),
    "topk": (lambda s, x: s.c(torch.cat([s.a(x).topk(4, 1)[0]] * 2, 1)), "topk is not"),
    "padded by a constant": (
        lambda s, x: s.c(F.pad(s.a(x), (1, 1), value=0.7)), "with a constant",
    ),
    "sum over a part of the channels": (
        lambda s, x: s.c(s.a(x).view(-1, 2, 4, 6, 6).sum(1).repeat(1, 2, 1, 1)),
        "several axes",
    ),
    "shuffled into another axis": (
        lambda s, x: s.c(s.a(x).view(2, 2, 4, 6, 6).transpose(1, 3).reshape(2, 8, 6, 6)),
        "several axes",
    ),
    "broadcast": (lambda s, x: s.c(s.a(x) + s.a(x).mean(1, keepdim=True)), "reduces over"),
    "returned": (lambda s, x: (s.c(F.relu(y := s.a(x))), y.argmax(1)), "argmax is not"),
    "weight read": (
        lambda s, x: (s.c(F.relu(s.a(x))), s.a.weight.abs().sum()), "also read by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPPED)
def test_a_scale_does_not_pass(name: str) -> None:
    body, reason = STOPPED[name]
    model, x = built(body)
    applied = apply_pass(Rebalance("l2"), copy_model(model), x)
    assert not any(change.target == "a" for change in applied.changes)
    assert any(skip.target == "a" and reason in skip.reason for skip in applied.skips)
    with torch.no_grad():  # and it would have been another function
        moved = copy_model(model)
        scale = torch.logspace(-1, 1, 8, dtype=torch.float64)
        moved.a.weight.mul_(scale.view(-1, 1, 1, 1))
        moved.a.bias.mul_(scale)
        moved.c.weight.div_(scale.view(1, -1, 1, 1))
    assert error(model, moved, x) > 1e-3


class ReadsAll(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alias = self
        norm = torch.stack([parameter.abs().sum() for parameter in alias.parameters()]).sum()
        return self.c(F.relu(self.a(x))), norm


def test_a_forward_that_reads_all_parameters_by_another_name_of_self_stops_it() -> None:
    torch.manual_seed(0)
    model, x = ReadsAll(values).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    applied = apply_pass(Rebalance("l2"), copy_model(model), x)
    assert not applied.changes
    assert any("reads all tensors of the model" in skip.reason for skip in applied.skips)
