"""Copies of a model that share its tensors until somebody writes."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rewrite.runtime.closures import functions_of, rebound
from rewrite.runtime.tree import Tree

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """Return a deep copy of `model` whose tensors share storage, copy-on-write, with the original.

    Structure, Python attributes and hooks are copied as by `copy.deepcopy`; a hook that holds
    modules of the model holds those of the copy. Each parameter and buffer is a new tensor object;
    its storage is duplicated only when either side is written to.
    Tied tensors stay tied. Python modules and TorchScript functions
    held as attributes are shared, as nothing can copy them.
    """
    programs = list(sys.modules.values())
    memo: dict[int, Any] = dict(zip(map(id, programs), programs, strict=True))
    held = {module: _objects_of(module) for _, module in Tree(model).modules()}
    attributes = [value for objects in held.values() for value in _attributes(objects)]
    memo |= {
        id(value): value for value in attributes if isinstance(value, torch.jit.ScriptFunction)
    }
    for tensor in (*_registered(held), *_tensors_among(attributes)):
        if id(tensor) not in memo:
            memo[id(tensor)] = lazy_copy(tensor)
    binders = list(_bind_functions(held, memo))
    _copy_plain_modules(held, memo)
    copied = copy.deepcopy(model, memo)
    for put_in in binders:
        put_in(lambda value: copy.deepcopy(value, memo))
    return copied


def _objects_of(module: nn.Module) -> list[tuple[str, Any]]:
    """Return what a module holds, but for numbers, names and tuples of them: a copy shares those.

    Each module is asked once: most of it is empty dicts, of which there are a dozen a module.
    """
    return [
        (key, value)
        for key, value in vars(module).items()
        if type(value) not in _UNCHANGED
        and not (type(value) is tuple and _UNCHANGED.issuperset(map(type, value)))
    ]


def _bind_functions(
    held: Mapping[nn.Module, list[tuple[str, Any]]], memo: dict[int, Any]
) -> Iterator[Callable[[Callable[[Any], Any]], None]]:
    """Enter into `memo` the hooks that hold modules of the tree; yield what binds each to a copy.

    Also those that hold a tensor of it, and those that name a module by a global variable.
    """
    inside = set(map(id, held))

    def is_copied(value: Any) -> bool:
        return id(value) in inside or (isinstance(value, torch.Tensor) and id(value) in memo)

    for objects in held.values():
        for function in functions_of(objects):
            if id(function) not in memo and (bound := rebound(function, is_copied)) is not None:
                memo[id(function)], put_in = bound
                yield put_in


def _attributes(objects: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    """Yield what a module holds beside what is registered, but for what nothing has to copy.

    That is tuples and dicts, in which `copy.deepcopy` finds what it copies.
    """
    return (value for _, value in objects if type(value) not in _FOLLOWED)


_UNCHANGED = frozenset({type(None), bool, int, float, str, type})

_DICTS = frozenset({dict, OrderedDict})

_FOLLOWED = _DICTS | {tuple}


def _copy_plain_modules(
    held: Mapping[nn.Module, list[tuple[str, Any]]], memo: dict[int, Any]
) -> None:
    """Enter into `memo` copies of the modules that `copy.deepcopy` copies attribute by attribute.

    They hold the same as its own would; most of what a module holds is an empty dict or a number,
    which needs none of its machinery.
    """
    plain: dict[type, bool] = {}
    copies: list[nn.Module] = []
    for module in held:
        kind = type(module)
        if kind not in plain:
            plain[kind] = _is_plain(kind)
        if plain[kind] and id(module) not in memo:
            memo[id(module)] = kind.__new__(kind)
            copies.append(module)
    # The innermost first: a class that copies itself may look at its children.
    for module in reversed(copies):
        attributes = vars(memo[id(module)])
        attributes.update(vars(module))
        for key, value in held[module]:
            if type(value) in _DICTS and not value and id(value) not in memo:
                attributes[key] = memo[id(value)] = type(value)()
            else:
                attributes[key] = _copied(value, memo)
        attributes.pop("_compiled_call_impl", None)  # nor does torch pickle it


def _is_plain(kind: type) -> bool:
    """Return whether a class leaves it to Python and torch.nn how its instances are copied.

    What torch.nn does beside is for files of older versions: it adds attributes that are missing.
    """
    theirs: Any = kind
    return (
        not hasattr(kind, "__deepcopy__")
        and theirs.__new__ is object.__new__
        and theirs.__reduce_ex__ is object.__reduce_ex__
        and theirs.__reduce__ is object.__reduce__
        and theirs.__getstate__ is nn.Module.__getstate__
        and str(theirs.__setstate__.__module__).startswith("torch.nn.modules.")
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
    )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _UNCHANGED:
        return value
    if (known := memo.get(id(value))) is not None:
        return known
    if kind in _DICTS and (not value or all(type(key) is str for key in value)):
        twin = memo[id(value)] = kind()
        for key, held in value.items():
            twin[key] = _copied(held, memo)
        return twin
    return copy.deepcopy(value, memo)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers, then the other tensors that are copied lazily."""
    held = list(modules)
    yield from _registered(held)
    yield from _tensors_among(v for module in held for v in _attributes(vars(module).items()))


def _registered(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)


def _tensors_among(attributes: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among attributes.

    Old-style weight_norm and friends keep the computed weight, not a leaf, as an attribute. A
    recurrent layer lists its weights, a computed one among them.
    """
    for value in attributes:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from (v for v in value if isinstance(v, torch.Tensor))


_SMALL = 1 << 16
"""Bytes below which a buffer is copied."""


def lazy_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that shares the storage of `tensor` until either is written to."""
    if is_lazy(tensor):
        # torch refuses to copy an uninitialized buffer; an empty one says as much.
        kind: Any = type(tensor)
        return cast(
            torch.Tensor,
            kind(requires_grad=tensor.requires_grad, device=tensor.device, dtype=tensor.dtype),
        )
    data = tensor.detach()
    shared = torch._lazy_clone(data) if _owns_memory(tensor, data) else data.clone()
    if isinstance(tensor, nn.Parameter):
        parameter = copy.copy(tensor) if type(tensor) is not nn.Parameter else None
        if parameter is not None:
            if type(parameter) is not type(tensor):  # a class may say what a deep copy is, alone
                parameter = copy.deepcopy(tensor)
            parameter.data = shared
            return parameter
        return nn.Parameter(shared, requires_grad=tensor.requires_grad)
    return shared.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _owns_memory(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Return whether a copy of `tensor` may share its storage until either side writes.

    The memory of a storage that came out of a file, from numpy or from another process belongs to
    no allocator; torch would crash when such a shared storage is written to. Nor can a shared
    storage be resized, as quantization's observers do with their small buffers.
    """
    if type(data) is not torch.Tensor or data.layout is not torch.strided:
        return False
    if data.is_quantized or data.is_meta:
        return False
    storage = tensor.untyped_storage()
    if not isinstance(tensor, nn.Parameter) and storage.nbytes() < _SMALL:
        return False
    return bool(storage.resizable()) and not (data.is_cpu and storage.is_shared())


def own_memory_(
    model: nn.Module,
    read: Callable[[torch.UntypedStorage], torch.UntypedStorage] = torch.UntypedStorage.clone,
) -> None:
    """Move what came out of a file into memory of its own, one storage after the other.

    Values, identities of the tensors and ties stay; from then on copies can share storage. `read`
    returns the bytes of a storage in memory of their own.
    """
    moved: dict[int, torch.UntypedStorage] = {}
    for tensor in list(_tensors(module for _, module in Tree(model).modules())):
        if is_lazy(tensor) or type(tensor.data) is not torch.Tensor:
            continue
        data = tensor.detach()
        if data.layout is not torch.strided or data.is_quantized or data.device.type == "meta":
            continue
        storage = data.untyped_storage()
        if storage.resizable():
            continue
        if storage._cdata not in moved:
            moved[storage._cdata] = read(storage)
        home = torch.empty(0, dtype=data.dtype, device=data.device)
        source = moved[storage._cdata]
        tensor.data = home.set_(source, data.storage_offset(), data.shape, data.stride())
