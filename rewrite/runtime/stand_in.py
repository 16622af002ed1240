"""A copy of a model's tree that a forward may do anything to: nothing of it reaches the model.

Modules are copied shallowly, with the containers and objects that they hold; each parameter and
buffer is replaced by what the caller makes of it, a tensor without values as a rule. Whatever a
forward assigns, appends, counts or writes lands on the copy.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections import deque
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rewrite.runtime.closures import rebound
from rewrite.runtime.copying import lazy_copy
from rewrite.runtime.tree import Tree

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))

_SHARED = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, torch.Size, torch.dtype}
    | {torch.device, range, slice, type(len)}
)


def stand_in(
    tree: Tree,
    registered: Callable[[Tensor], Tensor],
    attribute: Callable[[Tensor], Tensor],
) -> nn.Module:
    """Return a copy of the model of `tree` that shares no state with it.

    Args:
        tree: the modules of the model.
        registered: makes what stands for a parameter or buffer.
        attribute: makes what stands for a tensor that is a plain attribute.
    """
    return _Copier(registered, attribute).root(tree)


def without_values(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, dtype and strides on the meta device."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain and (is_lazy(tensor) or type(tensor.detach()) is not Tensor):
        return lazy_copy(tensor)
    if tensor.is_meta:
        return lazy_copy(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return lazy_copy(tensor)
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


class Attributes:
    """What some modules hold at one moment, their lists and dicts included, to be put back.

    Attributes:
        moved: modules that were put elsewhere since, as far as that was put back.
        altered: whether anything was.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.moved: set[nn.Module] = set()
        self.altered = False
        self._held: dict[nn.Module, tuple[dict[str, Any], list[tuple[Any, Any]]]] = {}
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        """Remember one more module, as it is now."""
        if module not in self._held:
            held = vars(module)
            contents = [
                (value, value.copy())
                for key, value in held.items()
                if isinstance(value, list | dict)
                and (key == "_modules" or key not in _OWN_ATTRIBUTES)
            ]
            self._held[module] = (dict(held), contents)

    def put_back(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Let the modules, all or some of them, hold what they held."""
        for module in self._held if modules is None else modules:
            copied, contents = self._held[module]
            for value, items in contents:
                if len(value) != len(items) or _differs(value, items):
                    self.altered = True
                    self.moved |= _moved(items, value)
                    value.clear()
                    value.extend(items) if isinstance(value, list) else value.update(items)
            held = vars(module)
            if len(held) != len(copied) or _differs(held, copied):
                self.altered = True
                self.moved |= _moved(copied, held)
                held.clear()
                held.update(copied)

    def unchanged(self) -> set[int]:
        """Return the ids of tensors that are attributes as they were, and that nothing wrote."""
        return {
            id(value)
            for module, (copied, _) in self._held.items()
            for key, value in copied.items()
            if isinstance(value, Tensor) and not value._version and vars(module).get(key) is value
        }


def _moved(before: Any, now: Any) -> set[nn.Module]:
    """Return the modules of two states of a list or dict that one of them has elsewhere."""
    old, new = (
        dict(held) if isinstance(held, dict) else dict(enumerate(held)) for held in (before, now)
    )
    apart = [key for key in old.keys() | new.keys() if old.get(key) is not new.get(key)]
    found = (held.get(key) for key in apart for held in (old, new))
    return {value for value in found if isinstance(value, nn.Module)}


def _differs(value: Any, copied: Any) -> bool:
    """Return whether two containers of one length hold other objects, or in another order."""
    if isinstance(value, dict):
        same = all(map(operator.is_, value.values(), copied.values()))
        return not (same and all(map(operator.is_, value, copied)))
    return not all(map(operator.is_, value, copied))


class _Copier:
    """Copies values once each; what nothing can copy is shared."""

    def __init__(
        self, registered: Callable[[Tensor], Tensor], attribute: Callable[[Tensor], Tensor]
    ) -> None:
        self._registered = registered
        self._attribute = attribute
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id is only good as long as its object lives

    def root(self, tree: Tree) -> nn.Module:
        """Copy every module of `tree`; all exist before the first is filled, whatever the depth."""
        modules = [module for _, module in tree.modules()]
        for module in modules:
            self._shell(module)
        for module in modules:
            self._fill(module)
        return cast(nn.Module, self._memo.get(id(tree.model), tree.model))

    def _shell(self, module: nn.Module) -> nn.Module:
        made: nn.Module = object.__new__(type(module))
        self._memo[id(module)] = made
        return made

    def _fill(self, module: nn.Module) -> None:
        held = vars(self._memo[id(module)])
        held.update(vars(module))
        for key, value in vars(module).items():
            kind = type(value)
            if kind in _SHARED or (kind is tuple and _SHARED.issuperset(map(type, value))):
                continue
            if key in _OWN_ATTRIBUTES and not value:
                held[key] = kind()
            elif key in ("_parameters", "_buffers"):
                held[key] = {k: None if t is None else self._tensor(t) for k, t in value.items()}
            elif key == "_modules" and kind is dict:
                held[key] = {k: None if m is None else self._module(m) for k, m in value.items()}
            elif key not in ("_graph", "meta"):  # of a GraphModule: no forward changes them
                held[key] = self.value(value)

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._memo:
            self._kept.append(module)
            if isinstance(module, torch.jit.ScriptModule):
                self._memo[id(module)] = self._other(module)  # whole: what is in it is compiled
            else:
                self._shell(module)
                self._fill(module)
        return cast(nn.Module, self._memo[id(module)])

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._memo:
            self._memo[id(tensor)] = self._registered(tensor)
        return cast(Tensor, self._memo[id(tensor)])

    def value(self, value: Any) -> Any:
        """Return a copy of what an attribute holds."""
        if type(value) in _SHARED:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        self._kept.append(value)
        made = self._memo[id(value)] = self._made(value)
        return made

    def _made(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._attribute(value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.value(value.__self__))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            args = tuple(map(self.value, value.args))
            return functools.partial(
                self.value(value.func), *args, **self._items(value.keywords.items())
            )
        kind = type(value)
        if isinstance(value, dict) and kind.__module__ in ("builtins", "collections"):
            made = copy.copy(value)
            self._memo[id(value)] = made
            made.clear()
            made.update(self._items(value.items()))
            return made
        if kind in (list, set, tuple, frozenset):
            return kind(map(self.value, value))
        if kind is deque:
            return deque(map(self.value, value), value.maxlen)
        return self._other(value)

    def _items(self, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {key: self.value(item) for key, item in items}

    def _function(self, function: FunctionType) -> Any:
        """Return `function` itself, or one that holds the copies of what it holds."""
        bound = rebound(function, lambda value: True)
        if bound is None:
            return function
        made, put_in = bound
        self._memo[id(function)] = made
        put_in(self.value)
        return made

    def _other(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # noqa: BLE001 - any class may forbid it, with any error
            return value
