"""Every pass that promises equality is judged by its tensors as they were before it rounded them.

A fault of 1e-4 in one channel of any tensor that a pass writes is caught: where what is stored is
off, and where the arithmetic of the pass itself is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import models
import rewrite
from rewrite import registry
from rewrite.equivalence.exactness import misrounded, present
from rewrite.equivalence.rounding import stored_rounding
from rewrite.outcomes import Contract
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model
from rewrite.runtime.tree import Tree, join
from tests.equivalence.test_exactness import network
from tests.streams.blocks import PreNorm, bare, draw
from tests.streams.blocks import X as TOKENS

Make = Callable[[], nn.Module]

X = 10 * torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
"""Large enough to bring every channel to life, and over the bound that clips it."""


def clipped() -> nn.Module:
    layers = (nn.ReLU6() if isinstance(m, nn.ReLU) else m for m in network(1))
    return nn.Sequential(*layers).eval()


def unbalanced() -> nn.Module:
    layers = (m for m in network() if not isinstance(m, nn.BatchNorm2d))
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-1, 1, 8).view(8, 1, 1, 1))
    return model


def by_layer(change: Callable[[nn.Module], object]) -> Make:
    """Return what makes a network each of whose convolutions went through `change`."""

    def make() -> nn.Module:
        model = network()
        for module in model:
            if isinstance(module, nn.Conv2d):
                change(module)
        return model.eval()

    return make


def offset(conv: nn.Module) -> None:
    """Give a weight a mean that is large beside its spread: their sum cancels."""
    with torch.no_grad():
        conv.weight.add_(3.0)


def old_weight_norm(conv: nn.Module) -> None:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        nn.utils.weight_norm(conv)


def standardized() -> nn.Module:
    return apply_pass(registry.parse("weight-standardize"), by_layer(offset)()).model


def synced() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network()).eval()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.wide, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.relu(self.wide(x) + self.point(x) + x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x += self.shift
        return x.relu_()


def seeded(make: Make) -> Make:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return models.randomize_norms_(make().eval(), 1)

    return made


CASES: Mapping[str, tuple[str, Make]] = {
    "fold": ("fold", network),
    "fold, weight norm": ("fold", by_layer(parametrizations.weight_norm)),
    "fold, old-style weight norm": ("fold", by_layer(old_weight_norm)),
    "fold, spectral norm": ("fold", by_layer(parametrizations.spectral_norm)),
    "fold, old-style spectral norm": ("fold", by_layer(nn.utils.spectral_norm)),
    "fold, orthogonal": ("fold", by_layer(parametrizations.orthogonal)),
    "fold, pruned": ("fold", by_layer(lambda m: prune.l1_unstructured(m, "weight", 0.3))),
    "merge-branches": ("merge-branches", seeded(Branches)),
    "rebalance": ("rebalance", unbalanced),
    "clip-channels": ("clip-channels", clipped),
    "freeze-bn": ("freeze-bn", network),
    "bn-to-sync-bn": ("bn-to-sync-bn", network),
    "sync-bn-to-bn": ("sync-bn-to-bn", synced),
    "bn-to-weight-norm": ("bn-to-weight-norm", network),
    "weight-norm": ("weight-norm", network),
    "remove-weight-norm": ("remove-weight-norm", by_layer(parametrizations.weight_norm)),
    "remove-weight-norm, old style": (
        "remove-weight-norm", by_layer(old_weight_norm),
    ),
    "weight-standardize": ("weight-standardize", network),
    "weight-standardize, large means": ("weight-standardize", by_layer(offset)),
    "remove-standardize": ("remove-standardize", standardized),
    "out-of-place": ("out-of-place", seeded(InPlace)),
    "ln-to-rms": ("ln-to-rms", lambda: draw(PreNorm()).float()),
    "rotate-stream": ("rotate-stream", lambda: bare().float()),
}  # fmt: skip
"""A pass that promises equality, and a model in float32 that it rewrites."""


NO_EQUALITY = {
    "bn-to-gn", "bn-to-ln", "bn-to-in", "recalibrate-bn", "reinit",
}  # fmt: skip
"""Passes that make another function: no tensor of theirs is what equality would ask for."""


def test_every_pass_that_promises_equality_is_here() -> None:
    equal = {Contract.EXACT, Contract.EXACT_IN_EVAL}
    every = {name: type(registry.parse(name)) for name in registry.entries()}
    own = {name: kind for name, kind in every.items() if kind.__module__.startswith("passes.")}
    assert {name for name, kind in own.items() if kind.contract in equal} == {
        name for name, _ in CASES.values()
    }
    assert {name for name, kind in own.items() if kind.contract not in equal} == NO_EQUALITY


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Applied]:
    """Return a model, its inputs, and what a pass made of it."""
    name, make = CASES[request.param]
    model = make()
    stream = name in ("ln-to-rms", "rotate-stream")
    inputs = TOKENS.float() if stream else X
    applied = apply_pass(registry.parse(name), copy_model(model), inputs, keep_exact=True)
    return model, inputs, applied


def judged(model: nn.Module, inputs: Any, made: Applied, other: nn.Module, exact: Any) -> Any:
    touched = {name for change in made.changes for name in change.touched}
    return rewrite.verify(
        model, other, inputs, exact=exact, contract="exact-in-eval", level="quick", touched=touched
    )


def test_no_noise_model_judges_it(case: tuple[nn.Module, Any, Applied]) -> None:
    model, inputs, made = case
    found = judged(model, inputs, made, made.model, made.exact)
    assert made.changes and found.ok and found.rounding is None and found.max_rel < 1e-9
    known = present(made.model, made.exact)
    assert known and all(join(*key) in known for key in stored_rounding(made.model, model))


def one_channel_off(tensor: Tensor, channel: int) -> Tensor:
    off = tensor.detach().clone()
    rows = off.unsqueeze(0) if off.dim() == 0 else off
    rows[channel] *= 1 + 1e-4
    return off


def channel_of(tensor: Tensor) -> int | None:
    """Return a channel whose values are not zero, the least of them."""
    size = tensor.detach().abs().reshape(tensor.shape[0] if tensor.dim() else 1, -1).amax(1)
    alive = [(float(value), index) for index, value in enumerate(size) if value > 0]
    return min(alive)[1] if alive else None


def tensor_of(tree: Tree, name: str) -> Tensor:
    owner, _, attr = name.rpartition(".")
    stored: Tensor = getattr(tree.names[owner], attr)
    return stored


def some(names: list[str]) -> list[str]:
    """Return four names at most, from the first to the last of them."""
    return names[:: 1 + len(names) // 4]


def with_fault(model: nn.Module, name: str, value: Tensor) -> nn.Module:
    """Return a copy of a model one of whose tensors is another one."""
    other = copy_model(model)
    owner, _, attr = name.rpartition(".")
    module = Tree(other).names[owner]
    held: dict[str, Any] = module._parameters if attr in module._parameters else module._buffers
    with torch.no_grad():
        held[attr].copy_(value)
    return other


def test_a_fault_of_1e_4_in_a_stored_channel_is_caught(
    case: tuple[nn.Module, Any, Applied],
) -> None:
    model, inputs, made = case
    known = present(made.model, made.exact)
    tree = Tree(made.model)
    channels = {name: channel_of(tensor_of(tree, name)) for name in known}
    names = [name for name, channel in channels.items() if channel is not None]
    assert names
    for name in names:
        other = with_fault(made.model, name, one_channel_off(tensor_of(tree, name), channels[name]))
        (reason,) = misrounded(other, known)
        assert reason.startswith(f"{name} is not what its exact value rounds to")
        if name in some(names):
            found = judged(model, inputs, made, other, made.exact)
            assert not found.ok and reason in found.reasons, name


def test_a_fault_of_1e_4_in_the_arithmetic_of_a_pass_is_caught(
    case: tuple[nn.Module, Any, Applied],
) -> None:
    """What is stored and what it is said to be are off alike: then the function is.

    Four tensors at most are put off, one after another: a verification each.
    """
    model, inputs, made = case
    sized = {
        name: value()
        for name, value in present(made.model, made.exact).items()
        if not name.endswith(WITHOUT_SIZE)
    }
    names = [name for name, exact in sized.items() if channel_of(exact) is not None]
    assert names
    for name in some(names):
        channel = channel_of(sized[name])
        assert channel is not None
        wrong = one_channel_off(sized[name], channel)
        exact = {**made.exact, name: partial(Tensor.detach, wrong)}
        found = judged(model, inputs, made, with_fault(made.model, name, wrong), exact)
        assert not found.ok, name


WITHOUT_SIZE = ("weight.original1", "weight.original2")
"""Directions of a weight norm, and what a standardization standardizes: of any scale."""
