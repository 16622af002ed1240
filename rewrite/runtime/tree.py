"""The tree of a model's modules: names, aliases, replacement.

PyTorch registers modules in `_modules`; people also keep them in plain lists, dicts, dataclasses
and namespaces, where `named_modules` does not see them. Both are named here: `layers.0.conv` for
the registered ones, `branches[0].conv`, `heads['a']` or `box.norm` for those in plain containers.
What holds a module in a way that nothing can exchange (a closure, a set) is noted beside it.
"""

from __future__ import annotations

import enum
import functools
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import nn

# Attributes of nn.Module itself, and fx's own bookkeeping, which never hold a hidden child.
_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__) | {"_graph", "_tracer_cls", "meta"}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Whose functions run with the module, and may hold others."""


_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, torch.Tensor, torch.Size}
    | {torch.dtype, torch.device, nn.Parameter, range, slice}
)


_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}
"""Packages whose objects are not looked into: they hold no module of a user."""


class Field(str):
    """A step to an attribute of an object, beside the indexes and keys of containers."""

    __slots__ = ()


class Slot(NamedTuple):
    """One place that holds a module: `parent.key`, or `parent.attr[path...]` in a container."""

    parent: nn.Module
    attr: str
    path: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        """The slot's part of a qualified name."""
        if not self.path:
            return self.attr
        steps = (f".{key}" if isinstance(key, Field) else f"[{key!r}]" for key in self.path)
        return self.attr + "".join(steps)

    def set(self, module: nn.Module) -> None:
        """Put `module` in this place."""
        if not self.path and self.attr in self.parent._modules:
            self.parent._modules[self.attr] = module
            return
        held = vars(self.parent)
        held[self.attr] = _with_item(held[self.attr], self.path, module)


def _with_item(container: Any, path: tuple[Any, ...], module: nn.Module) -> Any:
    if not path:
        return module
    key, rest = path[0], path[1:]
    if isinstance(container, tuple):
        items = list(container)
        items[key] = _with_item(items[key], rest, module)
        kind = type(container)
        return kind(*items) if hasattr(container, "_fields") else kind(items)
    if isinstance(key, Field):
        item = _with_item(vars(container)[key], rest, module)
        object.__setattr__(container, key, item)  # a frozen dataclass, too
        return container
    container[key] = _with_item(container[key], rest, module)
    return container


def slots(module: nn.Module) -> Iterator[tuple[Slot, nn.Module]]:
    """Yield each direct child of `module` with the place that holds it, hidden ones last.

    A TorchScript module has none: what is inside of it is compiled, and cannot be exchanged.
    """
    yield from _registered(module)
    yield from _hidden(module)


def _registered(module: nn.Module) -> list[tuple[Slot, nn.Module]]:
    if not module._modules or isinstance(module, torch.jit.ScriptModule):
        return []
    return [(Slot(module, k), child) for k, child in module._modules.items() if child is not None]


def _hidden(module: nn.Module) -> list[tuple[Slot, nn.Module]]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [
        (Slot(module, attr, path), child)
        for attr, value in attributes_of(module)
        for path, child in _inside(value)
    ]


def attributes_of(module: nn.Module) -> list[tuple[str, Any]]:
    """Return what a module holds beside what each has, but for plain values and sequences of them.

    Most modules hold nothing else: numbers, names, sizes.
    """
    return [
        (attr, value)
        for attr, value in vars(module).items()
        if attr not in _OWN_ATTRIBUTES and type(value) not in _PLAIN and not _holds_nothing(value)
    ]


def _holds_nothing(value: Any) -> bool:
    """Return whether `value` is plain, or a sequence of what is: kernel sizes, strides, names."""
    kind = type(value)
    return kind in _PLAIN or (kind in (tuple, list) and _PLAIN.issuperset(map(type, value)))


def _inside(
    value: Any, path: tuple[Any, ...] = (), depth: int = 0
) -> Iterator[tuple[tuple[Any, ...], nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth < 3 and type(value) not in _PLAIN:
        for key, item in _items(value):
            yield from _inside(item, (*path, key), depth + 1)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a container or an object of a user's class holds, with the step to it."""
    if isinstance(value, list | tuple | deque):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif _is_holder(value):
        yield from ((Field(key), item) for key, item in vars(value).items())


def _is_holder(value: Any) -> bool:
    if isinstance(value, SimpleNamespace):
        return True
    if isinstance(value, type | enum.Enum) or not hasattr(value, "__dict__"):
        return False
    kind = type(value)
    return is_dataclass(kind) or kind.__module__.partition(".")[0] not in _FOREIGN


def _pinned(value: Any, how: str = "", depth: int = 0) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that `value` holds so that nothing can be put in their place, and how.

    `how`: what around it, in words, is such a thing; "" for what can be exchanged.
    """
    if isinstance(value, nn.Module):
        if how:
            yield value, how
        return
    if depth == _PINNED_DEPTH or _holds_nothing(value):
        return
    held, fixed = _fixed_parts(value)
    for item in held:
        yield from _pinned(item, how or fixed, depth + 1)
    if not fixed:
        for _, item in _items(value):
            yield from _pinned(item, how, depth + 1)


_PINNED_DEPTH = 5


_BESIDE_LISTS = frozenset({"collections", "types", "weakref"})
"""Modules of the standard library whose objects hold others as lists and dicts do."""


def _fixed_parts(value: Any) -> tuple[list[Any], str]:
    """Return what an object holds where nothing can be exchanged, and what it is, or ""."""
    if isinstance(value, FunctionType):
        held = [c.cell_contents for c in value.__closure__ or () if _is_set(c)]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return held, "a closure"
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()], "a partial"
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__], "a bound method"
    if isinstance(value, set | frozenset):
        return list(value), "a set"
    if isinstance(value, weakref.ref):
        return [value()], "a weak reference"
    if isinstance(value, dict) and any(isinstance(key, nn.Module) for key in value):
        return [*value, *value.values()], "a dict with modules for keys"
    if hasattr(value, "__wrapped__") and callable(value):
        return [value.__wrapped__], "a wrapped function"
    kind = type(value)
    if kind.__module__ in _BESIDE_LISTS and not isinstance(value, _EXCHANGED):
        return list(getattr(value, "__dict__", {}).values()), f"a {kind.__name__}"
    if getattr(kind, "__slots__", ()) and kind.__module__.partition(".")[0] not in _FOREIGN:
        names = [n for base in kind.__mro__ for n in _slot_names(base) if hasattr(value, n)]
        return [getattr(value, name) for name in names], "an object with slots"
    return [], ""


_EXCHANGED = (list, tuple, deque, dict, SimpleNamespace)


def _slot_names(kind: type) -> tuple[str, ...]:
    named = vars(kind).get("__slots__", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def join(prefix: str, label: str) -> str:
    """Return the qualified name of the child `label` of `prefix` (the root is "")."""
    return f"{prefix}.{label}" if prefix else label


class Tree:
    """Every module of a model under every name, looked up in constant time.

    Attributes:
        names: every qualified name to its module, in registration order, the root as "".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[str, nn.Module] = {"": model}
        self._canonical: dict[nn.Module, str] = {model: ""}
        self._slots: dict[nn.Module, list[Slot]] = {}
        self._aliases: dict[nn.Module, list[str]] = {model: [""]}
        self._walk(model)

    @functools.cached_property
    def pinned(self) -> dict[nn.Module, str]:
        """What also holds a module in a way that nothing can exchange: "a closure of …"."""
        found: dict[nn.Module, str] = {}
        for name, module in self.modules():
            hooks = ((attr, value) for attr in _HOOKS if (value := vars(module).get(attr)))
            for attr, value in (*hooks, *attributes_of(module)):
                for held, how in _pinned(value):
                    if held is not module and held in self._canonical:
                        found[held] = f"{join(name, attr)}, {how}, holds it too"
        return found

    def _walk(self, model: nn.Module) -> None:
        stack: list[tuple[str, nn.Module]] = [("", model)]
        hidden: deque[tuple[str, Slot, nn.Module]] = deque()
        while stack or hidden:
            if not stack:
                # A registered name is the better one: hidden places are entered last.
                name, slot, child = hidden.popleft()
                if self._record(name, slot, child):
                    stack.append((name, child))
                continue
            prefix, module = stack.pop()
            descend = []
            for slot, child in _registered(module):
                name = f"{prefix}.{slot.attr}" if prefix else slot.attr
                if self._record(name, slot, child):
                    descend.append((name, child))
            stack.extend(reversed(descend))
            for slot, child in _hidden(module):
                hidden.append((join(prefix, slot.label), slot, child))

    def _record(self, name: str, slot: Slot, module: nn.Module) -> bool:
        """Note one place; return whether the module is met for the first time."""
        self.names[name] = module
        self._slots.setdefault(module, []).append(slot)
        self._aliases.setdefault(module, []).append(name)
        if module in self._canonical:
            return False
        self._canonical[module] = name
        return True

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._canonical

    def name(self, module: nn.Module) -> str:
        """Return the first qualified name of `module`."""
        return self._canonical[module]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield each module once, under its first name; TorchScript is left out."""
        for module, name in self._canonical.items():
            if not isinstance(module, torch.jit.ScriptModule):
                yield name, module

    def scripted(self) -> Iterator[tuple[str, torch.jit.ScriptModule]]:
        """Yield each outermost TorchScript module, whose code and tensors no rewrite can change."""
        for module, name in self._canonical.items():
            if isinstance(module, torch.jit.ScriptModule):
                yield name, module

    def get(self, name: str) -> nn.Module:
        """Return the module called `name`, also when only a parent is listed under an alias.

        Raises:
            KeyError: there is none.
        """
        if name in self.names:
            return self.names[name]
        module = self.model
        for part in name.split("."):
            held = module._modules
            if part not in held or held[part] is None:  # TorchScript's mapping has no get
                raise KeyError(name)
            module = cast(nn.Module, held[part])
        return module

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return every other name under which the module called `name` is held."""
        return tuple(alias for alias in self._aliases[self.get(name)] if alias != name)

    def slots_of(self, module: nn.Module) -> list[Slot]:
        """Return every place that holds `module`."""
        return self._slots.get(module, [])

    def parents(self, name: str) -> Iterator[str]:
        """Yield the names of the modules that hold `name`, from the innermost to the root."""
        module = self.get(name)
        while module is not self.model:
            module = self._slots[module][0].parent
            yield self._canonical[module]

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in every place that holds `old`, and keep the names."""
        if old is self.model:
            self.model = new
        places = self._slots.pop(old, [])
        for slot in places:
            slot.set(new)
        self._slots.setdefault(new, []).extend(places)
        self._aliases[new] = self._aliases.pop(old)
        self._canonical[new] = self._canonical.pop(old)
        for name in self._aliases[new]:
            self.names[name] = new


def tensor_names(tree: Tree) -> dict[int, str]:
    """Return the qualified name of each parameter and buffer, by the id of the tensor."""
    names: dict[int, str] = {}
    for name, module in tree.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    names.setdefault(id(tensor), join(name, key))
    return names
