"""Build the tensors of a pickle from raw bytes.

    tensor[i] = storage[offset + sum_k i_k * stride_k],    0 <= offset, last index < length

The last index is computed in Python before anything is allocated, so a file cannot make a tensor
that reads beside its bytes, nor one that is larger than what the file holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from rewrite.checkpoint.archive import TensorBytes
from rewrite.checkpoint.vetting.opcodes import Name, Stored
from rewrite.errors import CheckpointError

_LARGE = 64 << 20
"""Elements above which a tensor may not have more of them than its storage."""

STORAGES: dict[str, torch.dtype] = {
    f"torch.{kind}": dtype for dtype, kind in torch.storage._dtype_to_storage_type_map().items()
} | {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}
"""The names by which a pickle refers to storages, and what their elements are."""


@dataclass(frozen=True)
class Reference:
    """A part of the file as a storage: its key, its type, and how many elements it has."""

    key: str
    dtype: torch.dtype
    length: int
    offset: int = 0

    @classmethod
    def of(cls, stored: Stored) -> Reference:
        """Read what a persistent id says.

        Raises:
            CheckpointError: it is none of a storage.
        """
        about = stored.about
        kind = about[1] if len(about) in (5, 6) and about[0] == "storage" else None
        if not isinstance(kind, Name) or kind.full not in STORAGES:
            raise CheckpointError("refers to something outside of itself that is no storage")
        key, length = str(about[2]), about[4]
        if not (_is_size(length) and key.isascii() and key.isalnum()):
            raise CheckpointError("refers to a storage of no size")
        view = about[5] if len(about) == 6 else None
        if view is None:
            return cls(key, STORAGES[kind.full], length)
        offset, count = getattr(view, "items", (None, None, None))[1:]
        if not (_is_size(offset) and _is_size(count)):
            raise CheckpointError("refers to a part of a storage that is none")
        return cls(key, STORAGES[kind.full], length, int(str(offset)))


@dataclass
class Storages:
    """The storages of one file, each read once, when the first tensor on it is built."""

    source: TensorBytes
    device: torch.device
    _read: dict[str, torch.UntypedStorage] = field(default_factory=dict)

    def __call__(self, reference: Reference, dtype: torch.dtype) -> torch.UntypedStorage:
        """Return the bytes of a storage on the device that was asked for."""
        size = reference.length * reference.dtype.itemsize
        if self.device.type == "meta":
            return torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()
        if reference.key not in self._read:
            read = self.source.storage(reference.key, size)
            self._read[reference.key] = (
                read if self.device.type == "cpu" else read.to(device=self.device)
            )
        return self._read[reference.key]


def view(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: Any,
    size: Any,
    stride: Any,
) -> torch.Tensor:
    """Return the tensor of that place, size and strides (in elements) on a storage.

    Raises:
        CheckpointError: it would reach beyond the storage.
    """
    sizes, strides = tuple(size), tuple(stride)
    if not (
        _is_size(offset)
        and len(sizes) == len(strides) <= 64
        and all(_is_size(value) for value in (*sizes, *strides))
    ):
        raise CheckpointError("holds a tensor whose size is no size")
    length, numel = storage.nbytes() // dtype.itemsize, math.prod(sizes)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if numel and last >= length:
        raise CheckpointError(f"holds a tensor of {sizes} that is larger than its bytes")
    if numel > _LARGE and numel > length:
        raise CheckpointError(f"holds a tensor of {sizes} that repeats {length} numbers")
    made = torch.empty(0, dtype=dtype, device=storage.device)
    return made.set_(cast(Any, storage), offset if numel else 0, sizes, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


Builder = Callable[[Storages, Sequence[Any]], Any]


def _plain(storages: Storages, args: Sequence[Any]) -> torch.Tensor:
    reference, offset, size, stride = args[:4]
    if not isinstance(reference, Reference):
        raise CheckpointError("holds a tensor without a storage")
    storage = storages(reference, reference.dtype)
    return view(storage, reference.dtype, offset + reference.offset, size, stride)


def _strided(storages: Storages, args: Sequence[Any]) -> torch.Tensor:
    """(storage, offset, size, stride, requires_grad, hooks, metadata=None)"""
    made = _plain(storages, args)
    _no_hooks(args[5])
    return _marked(made, bool(args[4]), args[6] if len(args) > 6 else None)


def _typed(storages: Storages, args: Sequence[Any]) -> torch.Tensor:
    """(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None)"""
    reference, offset, size, stride, grad, hooks, dtype = args[:7]
    if not (isinstance(reference, Reference) and isinstance(dtype, torch.dtype)):
        raise CheckpointError("holds a tensor without a storage")
    _no_hooks(hooks)
    made = view(storages(reference, dtype), dtype, offset, size, stride)
    return _marked(made, bool(grad), args[7] if len(args) > 7 else None)


def _marked(made: torch.Tensor, grad: bool, metadata: Any) -> torch.Tensor:
    bits = metadata or {}
    if not (isinstance(bits, dict) and set(bits) <= {"conj", "neg"}):
        raise CheckpointError("holds a tensor with marks that no tensor has")
    if bits:
        torch._utils.set_tensor_metadata(made, bits)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made.requires_grad_(grad) if grad else made


def _parameter(_: Storages, args: Sequence[Any]) -> nn.Parameter:
    """(data, requires_grad, hooks[, state])"""
    data, grad, hooks = args[:3]
    _no_hooks(hooks)
    if not isinstance(data, torch.Tensor):
        raise CheckpointError("holds a parameter that is no tensor")
    made = nn.Parameter(data.detach(), requires_grad=bool(grad))
    if len(args) > 3:
        give_attributes(made, args[3])
    return made


def _on_meta(_: Storages, args: Sequence[Any]) -> torch.Tensor:
    """(dtype, size, stride, requires_grad)"""
    dtype, size, stride, grad = args
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("holds a tensor of no type")
    made = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")
    return made.requires_grad_(bool(grad))


def _sparse(_: Storages, args: Sequence[Any]) -> torch.Tensor:
    """Build (layout, (indices, values, size[, coalesced]))."""
    layout, data = args
    if layout is torch.sparse_coo:
        indices, values, size = data[:3]
        made = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
        return made._coalesced_(bool(data[3])) if len(data) > 3 else made
    if layout not in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        raise CheckpointError("holds a sparse tensor of no layout")
    compressed, plain, values, size = data
    return torch.sparse_compressed_tensor(
        compressed, plain, values, size, layout=layout, check_invariants=True
    )


def _quantized(storages: Storages, args: Sequence[Any]) -> torch.Tensor:
    """(storage, offset, size, stride, quantizer, requires_grad, hooks)"""
    reference, offset, size, stride, quantizer, _, hooks = args
    if not isinstance(reference, Reference) or not isinstance(quantizer, tuple):
        raise CheckpointError("holds a tensor without a storage")
    _no_hooks(hooks)
    storage = storages(reference, reference.dtype)
    plain = {1: torch.int8, 4: torch.int32}[reference.dtype.itemsize]
    view(storage, plain, offset, size, stride)
    if quantizer[0] is torch.per_tensor_affine:
        made = torch._empty_affine_quantized(
            size, scale=float(quantizer[1]), zero_point=int(quantizer[2]), dtype=reference.dtype
        )
    elif quantizer[0] in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        made = torch._empty_per_channel_affine_quantized(
            size, scales=quantizer[1], zero_points=quantizer[2], axis=int(quantizer[3]),
            dtype=reference.dtype,
        )  # fmt: skip
    else:
        raise CheckpointError("holds a quantized tensor of no scheme")
    kind: Any = torch.storage.TypedStorage
    typed = kind(wrap_storage=storage, dtype=reference.dtype, _internal=True)
    return made.set_(typed, offset, tuple(size), tuple(stride))


def _with_attributes(storages: Storages, args: Sequence[Any]) -> torch.Tensor:
    """(builder, type, args, attributes): a tensor to which somebody gave attributes"""
    builder, kind, inner, state = args
    if isinstance(builder, type):
        name = f"{builder.__module__}.{builder.__qualname__}"
        raise CheckpointError(f"calls {name}, which could run anything")
    if kind not in _KINDS or not isinstance(builder, Rebuild):
        raise CheckpointError("holds a tensor of a class of its own")
    made = BUILDERS[builder.name](storages, inner)
    give_attributes(made, state)
    return cast(torch.Tensor, made)


def _uninitialized(_: Storages, args: Sequence[Any]) -> torch.Tensor:
    return cast(torch.Tensor, nn.UninitializedParameter(requires_grad=bool(args[0])))


_KINDS = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class Rebuild:
    """The name of a builder, where a pickle hands it to another one."""

    name: str


BUILDERS: Mapping[str, Builder] = {
    "torch._utils._rebuild_tensor": _plain,
    "torch._utils._rebuild_tensor_v2": _strided,
    "torch._utils._rebuild_tensor_v3": _typed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_meta_tensor_no_storage": _on_meta,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.nn.parameter.UninitializedParameter": _uninitialized,
}
"""The functions by which torch pickles tensors; each stands for code of this file."""


def give_attributes(made: torch.Tensor, state: Any) -> None:
    """Set attributes of a tensor that no method of a tensor bears the name of."""
    attributes = state or {}
    if isinstance(attributes, tuple):
        attributes = {key: value for part in attributes if part for key, value in part.items()}
    for key, value in attributes.items():
        if not isinstance(key, str) or hasattr(torch.Tensor, key) or not key.isidentifier():
            raise CheckpointError(f"holds a tensor with the attribute {key!r}")
        setattr(made, key, value)


def _no_hooks(hooks: Any) -> None:
    if hooks:
        raise CheckpointError("holds a tensor with hooks")
