"""Record summary statistics of every value in a forward, with its operation and its inputs.

    sketch(v) = (<r1, v>, ..., <rk, v>)        rj fixed vectors of +1 and -1
    |sketch(u) - sketch(v)|^2 / k  ~  |u - v|^2

Sketches tell two values apart without keeping either alive, so memory does not grow with the
activations, and a value of one model can be looked up among all values of another, wherever and
under whatever name it is computed there.

A `TorchFunctionMode` records the calls of torch functions in the model's code (`F.conv2d`,
`Tensor.view`, `+`). Nothing is traced, so control flow and opaque code do not matter.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from rewrite.provenance import shown_path
from rewrite.runtime.leaves import tensors
from rewrite.runtime.tree import Tree

_WIDTH = 4093


_PROJECTIONS = 16


@dataclass(frozen=True)
class Sketch:
    """A summary of one tensor: its projections, its norm and its number of elements."""

    numbers: np.ndarray[Any, np.dtype[np.float64]]
    norm: float
    count: int
    shape: tuple[int, ...]

    def distance(self, other: Sketch) -> float:
        """Return an estimate of |self - other| / |self|."""
        if self.count != other.count:
            return float("inf")
        apart = float(np.sqrt(np.mean((self.numbers - other.numbers) ** 2)))
        return apart / self.norm if self.norm else (float("inf") if apart else 0.0)


class Sketcher:
    """Computes sketches, with the same projections for all values of equal size and seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._columns = self._signs(_WIDTH)
        self._rows = self._signs(1)

    def _signs(self, length: int) -> torch.Tensor:
        signs = self._random.integers(0, 2, (length, _PROJECTIONS)) * 2.0 - 1.0
        return torch.from_numpy(signs)

    def __call__(self, value: torch.Tensor) -> Sketch:
        """Return the sketch of one value."""
        with _disable_current_modes():  # they would look at every operator of the sketch, too
            flat, norm = _flat(value)
            whole, rest = divmod(flat.numel(), _WIDTH)
            while len(self._rows) <= whole:
                self._rows = torch.cat([self._rows, self._signs(len(self._rows))])
            columns, rows = self._columns.to(flat.device), self._rows.to(flat.device)
            numbers = (flat[len(flat) - rest :] @ columns[:rest]) * rows[whole]
            if whole:
                projected = flat[: whole * _WIDTH].view(whole, _WIDTH) @ columns
                numbers += (projected * rows[:whole]).sum(0)
        return Sketch(numbers.cpu().numpy(), norm, flat.numel(), tuple(value.shape))


def _flat(value: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a tensor as a flat float64 vector without NaN or infinity, and its norm."""
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if value.device.type == "mps":
        value = value.cpu()
    flat = value.reshape(-1).to(torch.float64)
    norm = float(flat.norm())
    if not math.isfinite(norm):
        flat = torch.nan_to_num(flat, nan=1.0, posinf=2.0, neginf=-2.0)
        norm = float(flat.norm())
    return flat, norm


Key = tuple[str, int, str, int]
"""What identifies a call in another run, or in another model of the same names."""


@dataclass(frozen=True)
class Event:
    """One call of a function: by which module, its input values and its output values.

    Attributes:
        key: owner, number of its invocation, function, number of that call in the invocation.
        source: the line of the model's code, "file.py:123".
        inputs, outputs: indices into `Record.values`; constants are not among them.
    """

    key: Key
    source: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def owner(self) -> str:
        """The qualified name of the innermost module whose forward made the call."""
        return self.key[0]

    @property
    def function(self) -> str:
        """The name of the function that was called."""
        return self.key[2]


@dataclass
class Record:
    """All calls of one forward in order, and a sketch of every value that depends on the inputs.

    `bounds` holds, for some values, the relative error that arithmetic alone may cause.
    """

    events: list[Event] = field(default_factory=list)
    values: list[Sketch] = field(default_factory=list)
    producer: list[int | None] = field(default_factory=list)
    outputs: tuple[int, ...] = ()
    kept: list[torch.Tensor] = field(default_factory=list)
    bounds: dict[int, float] = field(default_factory=dict)

    def by_key(self) -> dict[Key, Event]:
        """Return the events by key, under which the other model's same call is found."""
        return {event.key: event for event in self.events}


class Near(NamedTuple):
    """The known value nearest to a given one, and its distance."""

    distance: float
    """How far it is, relative to the other one; infinite where no value has as many elements."""
    noise: float = 0.0
    """How far it may be off itself."""
    number: int | None = None
    """Which one it is."""


class Known:
    """Looks up values among those of a record.

    Args:
        sketches: the values that are known.
        noise: the relative error that each may have; () if all are exact.
    """

    def __init__(self, sketches: Sequence[Sketch], noise: Sequence[float] = ()) -> None:
        grouped: dict[int, list[int]] = {}
        for index, sketch in enumerate(sketches):
            grouped.setdefault(sketch.count, []).append(index)
        self._noise = noise
        self._groups = grouped
        self._matrices = {
            count: np.stack([sketches[index].numbers for index in group])
            for count, group in grouped.items()
        }

    def nearest(self, sketch: Sketch) -> Near:
        """Return the known value at the smallest distance."""
        matrix = self._matrices.get(sketch.count)
        if matrix is None:
            return Near(float("inf"))
        apart = np.sqrt(np.mean((matrix - sketch.numbers) ** 2, axis=1))
        best = int(apart.argmin())
        found = float(apart[best])
        relative = found / sketch.norm if sketch.norm else (float("inf") if found else 0.0)
        number = self._groups[sketch.count][best]
        return Near(relative, self._noise[number] if self._noise else 0.0, number)


class _Recorder(TorchFunctionMode):
    """The function mode that writes a `Record`."""

    def __init__(self, model: nn.Module, sketch: Sketcher, keep: Key | None) -> None:
        super().__init__()
        self.record = Record()
        self._keep = keep
        self._sketch = sketch
        self._names = {module: name for name, module in Tree(model).modules()}
        self._numbers = WeakTensorKeyDictionary()
        self._stack: list[tuple[str, int]] = [("", 0)]
        self._invocations: Counter[str] = Counter()
        self._calls: Counter[tuple[str, int, str]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = self._known(given)
        versions = [_version(tensor) for tensor in given]
        out = func(*args, **kwargs)
        if inputs:
            written = [
                t for t, version in zip(given, versions, strict=True) if _version(t) != version
            ]
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            fresh = [t for t in made if t not in self._numbers and all(t is not w for w in written)]
            if written or fresh:
                self._add(_name(func), inputs, [*written, *fresh])
        return out

    def start(self, value: Any) -> None:
        """Take the model's inputs as the first values."""
        for tensor in tensors(value):
            self._number(tensor, None)

    def finish(self, output: Any) -> Record:
        """Note which values the model returns, and hand out the record."""
        self.record.outputs = self._known(tensors(output))
        return self.record

    def enter(self, module: nn.Module, args: Any) -> None:
        """Record that a module's forward begins."""
        name = self._names.get(module, self._stack[-1][0])
        self._stack.append((name, self._invocations[name]))
        self._invocations[name] += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record that a module's forward ended; it made the outputs that no function call made."""
        unseen = [t for t in _found(output) if t not in self._numbers]
        inputs = self._known(_found(args))
        if unseen and inputs:
            self._add(type(module).__name__, inputs, unseen)
        self._stack.pop()

    def _add(self, function: str, inputs: tuple[int, ...], made: list[torch.Tensor]) -> None:
        owner, invocation = self._stack[-1]
        ordinal = self._calls[owner, invocation, function]
        self._calls[owner, invocation, function] += 1
        index = len(self.record.events)
        outputs = tuple(self._number(tensor, index) for tensor in made)
        key = (owner, invocation, function, ordinal)
        if key == self._keep:
            self.record.kept = [tensor.detach().clone() for tensor in made]
        self.record.events.append(Event(key, _source(), inputs, outputs))

    def _number(self, tensor: torch.Tensor, producer: int | None) -> int:
        number = len(self.record.values)
        self.record.values.append(self._sketch(tensor))
        self.record.producer.append(producer)
        self._numbers[tensor] = number
        return number

    def _known(self, given: Iterable[torch.Tensor]) -> tuple[int, ...]:
        return tuple(self._numbers[t] for t in given if t in self._numbers)


def _version(tensor: torch.Tensor) -> int:
    """Return a tensor's version counter; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def _found(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _name(func: Any) -> str:
    name = resolve_name(func) or getattr(func, "__name__", type(func).__name__)
    return str(name).rpartition(".")[2]


_MACHINERY = ("/torch/", "/rewrite/equivalence/", "/rewrite/runtime/")


def _source() -> str | None:
    """Return the innermost line of the model's code that is not PyTorch's, None without one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        filename = frame.f_code.co_filename
        # By name: a line counter may replace the code object of a function that is running.
        if filename == __file__ and frame.f_code.co_name == record.__name__:
            break
        if not any(part in filename for part in _MACHINERY):
            return f"{shown_path(filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    handles = (
        nn.modules.module.register_module_forward_pre_hook(recorder.enter),
        nn.modules.module.register_module_forward_hook(recorder.leave, always_call=True),
    )
    try:
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sketch: Sketcher,
    keep: Key | None = None,
) -> tuple[Record, Any]:
    """Run `model` once and return the record of its values, and its output.

    Only the outputs of the call with key `keep` are kept as tensors, in `Record.kept`.
    """
    recorder = _Recorder(model, sketch, keep)
    recorder.start([args, dict(kwargs)])
    with _recording(recorder):
        output = model(*args, **kwargs)
    return recorder.finish(output), output
