"""The tree of a model's modules: names, aliases, replacement.

PyTorch registers modules in `_modules`; people also keep them in plain lists, tuples and dicts,
where `named_modules` does not see them. Both are named here: `layers.0.conv` for the registered
ones, `branches[0].conv` or `heads['a']` for those in plain containers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

# Attributes of nn.Module itself, and fx's own bookkeeping, which never hold a hidden child.
_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__) | {"_graph", "_tracer_cls", "meta"}


@dataclass(frozen=True)
class Slot:
    """One place that holds a module: `parent.key`, or `parent.attr[path...]` in a container."""

    parent: nn.Module
    attr: str
    path: tuple[Any, ...] = ()

    @property
    def label(self) -> str:
        """The slot's part of a qualified name."""
        return self.attr + "".join(f"[{key!r}]" for key in self.path)

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
    container[key] = _with_item(container[key], rest, module)
    return container


def slots(module: nn.Module) -> Iterator[tuple[Slot, nn.Module]]:
    """Yield each direct child of `module` with the place that holds it, hidden ones last.

    A TorchScript module has none: what is inside of it is compiled, and cannot be exchanged.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    for key, child in module._modules.items():
        if child is not None:
            yield Slot(module, key), child
    for attr, value in vars(module).items():
        if attr not in _OWN_ATTRIBUTES and isinstance(value, list | tuple | dict | nn.Module):
            for path, child in _inside(value):
                yield Slot(module, attr, path), child


def _inside(
    value: Any, path: tuple[Any, ...] = (), depth: int = 0
) -> Iterator[tuple[tuple[Any, ...], nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth < 3 and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _inside(item, (*path, index), depth + 1)
    elif depth < 3 and isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(item, (*path, key), depth + 1)


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
            for slot, child in slots(module):
                name = join(prefix, slot.label)
                if slot.path or slot.attr not in module._modules:
                    hidden.append((name, slot, child))
                elif self._record(name, slot, child):
                    descend.append((name, child))
            stack.extend(reversed(descend))

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
        """Return the module called `name`, also when only a parent is listed under an alias."""
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
