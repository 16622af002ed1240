"""Run a model in float64 without changing it, and without needing a copy of it.

    wide(f)(x) = f with every narrow floating-point tensor t replaced by float64(t)

Two mechanisms together:

1. Parameters, buffers and tensors held as attributes are exchanged for float64 ones while the
   context is open, and put back after it; nothing is ever written into the model's own tensors.
   Streamed, a module's tensors are exchanged only while that module runs.
2. A dispatch mode keeps what a forward creates in float64: a hard-coded `dtype=torch.float32`, a
   `.float()`, a constant of a closure. Such code breaks `model.double()`.

Quantized operators and TorchScript submodules know no float64: they are given what they take, and
their results are widened.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from rewrite.memory import free_memory
from rewrite.runtime.modes import WIDE, ModuleExchange, widen
from rewrite.runtime.tree import Tree

_IN_FLOAT32 = ("torch.ao.nn.", "torch.ao.quantization.", "bitsandbytes.")
_QUANTIZED = frozenset({"quantized", "bitsandbytes"})


_NUMBERS = frozenset({int, float, bool, type(None)})

_QUANTIZING = ("aten::quantize_per", "aten::fake_quantize", "aten::_fused_moving_avg_obs_fq")


def narrow(value: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return `value` with every float64 tensor in it as `dtype`."""
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x,
        value,
    )


def narrowest_eps(model: nn.Module) -> float:
    """Return the rounding of those parts of `model` that know no float64; 0 where all do.

    They are given float32: values that agree to 1e-16 before them may be one rounding apart.
    """
    tree = Tree(model)
    quantized = any(type(module).__module__.startswith(_IN_FLOAT32) for _, module in tree.modules())
    return torch.finfo(torch.float32).eps if quantized or any(tree.scripted()) else 0.0


class KeepFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Every operator reads and returns float64 where it would use a narrower floating type."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the first operator imports torch._dynamo, which takes as long as importing torch.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # By identity, each kept with what it is: an operator computes its hash anew each time.
        self._kinds: dict[int, tuple[Any, _Kind]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if (found := self._kinds.get(id(func))) is None:
            found = self._kinds[id(func)] = (func, _Kind.of(func))
        kind = found[1]
        if kwargs and kwargs.get("dtype") in WIDE:
            kwargs = {**kwargs, "dtype": WIDE[kwargs["dtype"]]}
        if kind is _Kind.FILLING and type(args[1]) is float and (kwargs or {}).get("dtype") is None:
            kwargs = {**(kwargs or {}), "dtype": torch.float64}
        if kind in (_Kind.PLAIN, _Kind.FILLING):
            args = tuple(map(_wide_argument, args))
            if kwargs:
                kwargs = {key: _wide_argument(value) for key, value in kwargs.items()}
            return _wide_argument(func(*args, **(kwargs or {})))
        args = tuple(WIDE.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        if kind is _Kind.GROUPED:
            return _grouped_mm(*map(_wide_argument, args), **(kwargs or {}))
        if kind is _Kind.QUANTIZING:
            return widen(func(*narrow(args), **narrow(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Kind(enum.Enum):
    """How an operator is called under `KeepFloat64`."""

    PLAIN = "given and asked for float64"
    KEEPS_STORAGE = "returns, or writes into, the memory that it is given"
    FILLING = "makes a tensor of the default dtype, too narrow for the least number of float64"
    QUANTIZING = "knows no float64"
    GROUPED = "knows no float64, and is written out here"

    @classmethod
    def of(cls, func: Any) -> _Kind:
        """Return the kind of an operator."""
        if func.namespace in _QUANTIZED or func._schema.name.startswith(_QUANTIZING):
            return cls.QUANTIZING
        if func is torch.ops.aten.full.default:
            return cls.FILLING
        if func._schema.name == "aten::_grouped_mm":
            return cls.GROUPED
        return cls.KEEPS_STORAGE if func.is_view or func._schema.is_mutable else cls.PLAIN


def _grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return `torch.nn.functional.grouped_mm` in float64, one group after the other.

    Group g ends at offs[g], along the rows of `a` (S, K) @ `b` (G, K, N), along the columns of
    `b` for `a` (G, M, K) @ (K, S), and along what is summed for (M, S) @ (S, N).
    """
    if bias is not None:
        raise NotImplementedError("a grouped product with a bias, which PyTorch itself refuses")
    if offs is None:
        return torch.bmm(a, b)
    ends = [int(end) for end in offs.tolist()]
    slices = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    if a.dim() == b.dim() == 2:
        return torch.stack([a[:, part] @ b[part] for part in slices])
    if a.dim() == 2:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for group, part in enumerate(slices):
            out[part] = a[part] @ b[group]
        return out
    out = a.new_zeros(a.shape[1], b.shape[1])
    for group, part in enumerate(slices):
        out[:, part] = a[group] @ b[:, part]
    return out


def _wide_argument(value: Any) -> Any:
    """Return what `widen` returns, and a wide dtype for a narrow one; quick on what is wide."""
    kind = type(value)
    if (kind is torch.Tensor or kind is nn.Parameter) and value.dtype not in WIDE:
        return value
    if (kind is list or kind is tuple) and _NUMBERS.issuperset(map(type, value)):
        return value
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    if value is None or isinstance(value, bool | int | float | torch.device):
        return value
    return widen(value)


@contextlib.contextmanager
def in_float64(
    *models: nn.Module,
    streamed: bool = False,
    exact: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> Iterator[None]:
    """Let `models` compute in float64 while the context is open; inputs are the caller's to widen.

    Args:
        models: any models; their tensors and state are as before when the context closes.
        streamed: hold the float64 copy of one module at a time; slower, without a second copy.
        exact: what tensors of the last model are before they are rounded, by qualified name.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_scripted_as_they_are(model))
            exchange = ModuleExchange(model, exact if model is models[-1] else None)
            stack.callback(exchange.restore)
            exchange.own_buffers()
            for name, module in exchange.modules.items():
                if streamed:
                    stack.enter_context(_while_running(exchange, name, module))
                else:
                    exchange.widen(name)
        stack.enter_context(KeepFloat64())
        yield


def short_of_memory(*models: nn.Module) -> bool:
    """Return whether float64 copies of `models` would take more than half of the free memory."""
    needed = 0
    device = torch.device("cpu")
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            needed += 8 * tensor.numel()
            device = tensor.device
    return needed > free_bytes(device) // 2


def free_bytes(device: torch.device | None = None) -> int:
    """Return the memory that is free on a device; by default the computer's."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


class _Compiled(nn.Module):
    """A TorchScript module that is called in its own dtype, outside of every dispatch mode."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._call = (module,)  # in a tuple: no submodule of this one
        floating = (p.dtype for p in module.parameters() if p.is_floating_point())
        self._dtype = next(floating, torch.float32)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module answers, widened."""
        with _disable_current_modes():
            out = self._call[0](*narrow(args, self._dtype), **narrow(kwargs, self._dtype))
        return widen(out)


@contextlib.contextmanager
def _scripted_as_they_are(model: nn.Module) -> Iterator[None]:
    tree = Tree(model)
    places = [(slot, module) for _, module in tree.scripted() for slot in tree.slots_of(module)]
    for slot, module in places:
        slot.set(_Compiled(module))
    try:
        yield
    finally:
        for slot, module in places:
            slot.set(module)


@contextlib.contextmanager
def _while_running(exchange: ModuleExchange, name: str, module: nn.Module) -> Iterator[None]:
    def enter(module: nn.Module, args: Any) -> None:
        exchange.widen(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        exchange.drop(name)

    handles = (
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
