"""Capturing changes nothing, whatever a forward does: attributes, containers, tensors, storages."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

import models
import rewrite
from models.randomize import randomize_norms_
from passes import FoldNorm
from rewrite import registry
from rewrite.errors import CaptureError, PassError
from rewrite.graph.capture import capture
from rewrite.protocol import find_sites

_SPECS = {"reinit": "reinit{scheme=he}"}


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return everything that a model holds: objects, versions, storages, values."""
    return [item for name, module in model.named_modules() for item in _held(name, vars(module))]


def _held(name: str, value: Any, depth: int = 0) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, Tensor):
        data = value.detach()
        bits = None if nn.parameter.is_lazy(value) or data.is_meta else data.clone()
        yield name, type(value), id(value), value._version, data.is_meta, _Bits(bits)
        if bits is not None:
            yield name, value.untyped_storage()._cdata
    elif isinstance(value, nn.Module):
        yield name, id(value)
    elif isinstance(value, dict):
        yield name, id(value) if depth else 0, tuple(map(repr, value))
        for key, item in value.items():
            yield from _held(f"{name}.{key}", item, depth + 1)
    elif isinstance(value, list | tuple | deque | set):
        yield name, id(value), len(value)
        for index, item in enumerate(value):
            yield from _held(f"{name}[{index}]", item, depth + 1)
    elif hasattr(value, "__dict__") and depth < 3 and not callable(value):
        yield from _held(name, vars(value), depth + 1)
    else:
        yield name, type(value), repr(value)


class _Bits:
    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Bits)
        if self.tensor is None or other.tensor is None:
            return self.tensor is other.tensor
        return torch.equal(self.tensor, other.tensor)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Cache:
    seen: list[Any] = field(default_factory=list)
    last: Any = None


class Block(nn.Module):
    """A convolution and a norm, around which subclasses do what people do in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.before(x)
        y = self.bn(self.conv(x))
        self.after(y)
        return self.head(y)

    def before(self, x: Tensor) -> None: ...

    def after(self, y: Tensor) -> None: ...


class Assigns(Block):
    calls, last = 0, None

    def before(self, x: Tensor) -> None:
        self.calls += 1
        self.shape = x.shape

    def after(self, y: Tensor) -> None:
        self.last = y


class Appends(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.queue: deque[Any] = deque(maxlen=2)
        self.table: dict[str, Any] = {}
        self.box, self.space = Cache(), SimpleNamespace(count=0)

    def after(self, y: Tensor) -> None:
        self.seen.append(y)
        self.queue.append(y)
        self.table[f"call {len(self.table)}"] = y
        self.box.seen.append(y)
        self.box.last = y
        self.space.count += 1


class Counts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.total = torch.zeros(4)

    def before(self, x: Tensor) -> None:
        self.steps.add_(1)
        self.total += 1
        self.total.mul_(0.5)


class Registers(Block):
    def before(self, x: Tensor) -> None:
        self.register_buffer("cos", torch.arange(4.0).cos())
        self.extra = nn.Parameter(torch.ones(2))


class Caches(Block):
    cos = None

    def before(self, x: Tensor) -> None:
        if self.cos is None or x.shape[1] > self.cos.shape[0]:
            self.cos = torch.cos(torch.arange(x.shape[1], dtype=x.dtype))


class Moves(Block):
    """A momentum encoder: every forward moves another network's data."""

    def __init__(self) -> None:
        super().__init__()
        self.key = copy.deepcopy(self.conv)

    def before(self, x: Tensor) -> None:
        for a, b in zip(self.conv.parameters(), self.key.parameters(), strict=True):
            b.data = b.data * 0.9 + a.data * 0.1

    def after(self, y: Tensor) -> None:
        with torch.no_grad():
            for p in self.key.parameters():
                p.mul_(0.9)


class Hooks(Block):
    def before(self, x: Tensor) -> None:
        self.conv.register_forward_hook(lambda *_: None)


class Draws(Block):
    def before(self, x: Tensor) -> None:
        self.noise = float(numpy.random.rand()) + random.random() + float(torch.rand(()))


class Opaque(Assigns, Counts):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > -1e9 else x


class Raises(Appends):
    def after(self, y: Tensor) -> None:
        super().after(y)
        raise ValueError("this model never works")


def old_weight_norm() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), nn.ReLU())


def old_spectral_norm() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), Opaque())


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Block, Assigns, Appends, Counts, Registers, Caches, Moves, Hooks, Draws, Opaque, Raises,
        old_weight_norm, old_spectral_norm,
    )
}  # fmt: skip

X = (torch.randn(2, 4, 5, 5),)


def make(name: str) -> nn.Module:
    with torch.no_grad():
        return randomize_norms_(FORWARDS[name]()).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("inputs", [None, X], ids=["symbolic", "example"])
@pytest.mark.parametrize("name", FORWARDS)
def test_capture_and_every_find_change_nothing(name: str, inputs: Any):
    model = make(name)
    before = state(model)
    drawn = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].copy()
    captured = capture(model, inputs)
    for entry in sorted(registry.entries()):
        find_sites(registry.parse(_SPECS.get(entry, entry)), captured)
    assert state(model) == before
    assert random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
    assert (numpy.random.get_state()[1] == drawn[2]).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("spec", ["fold", "bn-to-gn{num_groups=2}"])
@pytest.mark.parametrize("name", FORWARDS)
def test_a_conversion_without_verification_leaves_nothing_behind(name: str, spec: str):
    model = make(name)
    before = state(model)
    if (name, spec) == ("Raises", "fold"):
        with pytest.raises(CaptureError, match="this model never works"):
            rewrite.convert(model, [spec], example_inputs=X, verify=False)
        assert state(model) == before
        return
    result = rewrite.convert(model, [spec], example_inputs=X, verify=False)
    assert state(model) == before
    for item in state(result.model):
        assert item[1] in (Tensor, nn.Parameter) or not isinstance(item[1], type) or len(item) < 6
        assert len(item) < 6 or not item[4], item[0]
    held = {key for _, m in result.model.named_modules() for key in vars(m)}
    assert held.isdisjoint({"cos", "extra", "shape", "noise"})


class Fails(FoldNorm):
    def rewrite_all(self, captured: Any, sites: Any, calibration: Any = None) -> Any:
        raise RuntimeError("half way")


@pytest.mark.parametrize("name", ["Assigns", "Appends", "Counts", "Raises"])
def test_a_failed_conversion_leaves_nothing_behind(name: str):
    model = make(name)
    before = state(model)
    if name == "Raises":
        capture(model, X)
    else:
        with pytest.raises(PassError, match="half way"):
            rewrite.convert(model, [Fails()], example_inputs=X, verify=False)
    assert state(model) == before


@pytest.mark.parametrize("name", models.all_models())
def test_capturing_a_reference_model_changes_nothing(name: str):
    model, inputs = models.build(name)
    before = state(model)
    capture(model, inputs)
    capture(model)
    assert state(model) == before


def test_the_state_notices_a_write():
    for change in (
        lambda m: m.bn.weight.data.add_(1),
        lambda m: setattr(m.bn, "weight", nn.Parameter(m.bn.weight.detach().clone())),
        lambda m: setattr(m, "calls", 3),
        lambda m: m.seen.append(1),
        lambda m: setattr(m.box, "last", 1),
    ):
        model = make("Appends")
        before = state(model)
        change(model)
        assert state(model) != before


@pytest.mark.parametrize("name", ["Assigns", "Appends", "Counts", "Caches", "Draws"])
def test_a_verified_conversion_runs_neither_the_argument_nor_the_result(name: str):
    model = make(name)
    before = state(model)
    result = rewrite.convert(model, ["freeze-bn"], example_inputs=X)
    assert result.report.ok and result.report.changes
    assert state(model) == before
    assert result.model.__dict__.keys() == model.__dict__.keys()
    assert getattr(result.model, "calls", 0) == 0 and not getattr(result.model, "seen", [])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_compiled_function_and_an_exported_program_are_copied():
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.function = torch.jit.script(swish)

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Swish()).eval()
    assert rewrite.convert(model, ["fold"], example_inputs=X).report.changes
    program = torch.export.export(model[:2], X).module()
    assert rewrite.convert(program, ["fold"], example_inputs=X).report.ok


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def test_a_device_context_works_after_one_that_was_first_entered_while_tracing() -> None:
    from torch.utils._device import _device_constructors

    from rewrite.tracing.patches import tracing

    _device_constructors.cache_clear()
    with tracing(nn.Module()), torch.device("meta"):
        torch.zeros(1)
    with torch.device("meta"):
        assert torch.zeros(1).is_meta and torch.empty(2, 3).is_meta


def test_compiled_code_gets_no_tensor_without_memory() -> None:
    runs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            held = [a for a in args if isinstance(a, Tensor)]
            runs.append(all(type(a.detach()) is Tensor and not a.is_meta for a in held))
            return graph(*args)

        return run

    x = torch.randn(2, 3, 6, 6)
    plain = randomize_norms_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    want = plain(x)
    compiled = torch.compile(plain, backend=backend)
    result = rewrite.convert(compiled, "fold", example_inputs=x, verify=False)
    assert [change.target for change in result.report.changes] == ["_orig_mod.1"] and not runs
    assert torch.allclose(result.model(x), want, atol=1e-5) and all(runs) and runs
