"""Find uses of a module in model code other than calls to it: reads, aliases, attribute access.

Each class is read once (`class_code`); what it does with a path below `self` is looked up in the
tree, so that the answers are about modules by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from rewrite.nn.edited import original_class
from rewrite.runtime.tree import Tree, join
from rewrite.tracing.code.class_code import ClassCode, ModuleUse, code_of
from rewrite.tracing.code.handed import with_handed
from rewrite.tracing.code.module_paths import Path

_PARAMETERS = frozenset({"weight", "bias"})
_HARMLESS = frozenset({"forward", "__call__", "training"}) | _PARAMETERS


class ModelCode:
    """The code of the classes of a model, and what it says about each module.

    Args:
        tree: the modules of the model.
        called: the names of the modules that some traced forward calls or enters.
    """

    def __init__(self, tree: Tree, called: frozenset[str]) -> None:
        self._tree = tree
        self._called = called

    @cached_property
    def _classes(self) -> dict[type, ClassCode]:
        kinds = {type(module) for _, module in self._tree.modules()}
        own = (
            k for k in kinds if not k.__module__.startswith(("torch.nn", "torch.ao", "torch.fx"))
        )
        return {kind: code_of(kind) for kind in own}

    @cached_property
    def _owners(self) -> list[tuple[str, nn.Module, ClassCode]]:
        """The modules whose class was read, by name, with their code."""
        found = []
        for name, module in self._tree.modules():
            kind = original_class(type(module))
            if (code := self._classes.get(type(module)) or self._classes.get(kind)) is not None:
                found.append((name, module, with_handed(module, code) if code.handed else code))
        return found

    def _at(self, owner: str, path: Path) -> Iterator[tuple[str, Path]]:
        """Yield the modules that `path` goes to, by first name, and what is left of the path."""
        places: list[str] = [owner]
        left = list(path)
        while left:
            step = left[0]
            below = []
            for place in places:
                children = self._tree.get(place)._modules
                keys = [k for k, child in children.items() if child is not None]
                wanted = keys if step is None else [k for k in keys if k == step]
                held = [self._tree.get(join(place, key)) for key in wanted]
                # A module that an edit has put there since is in no trace.
                below += [self._tree.name(module) for module in held if module in self._tree]
            if not below:
                if step is not None and len(left) > 1:
                    for place in places:
                        yield from self._items(join(place, step), left[1], tuple(left[2:]))
                    if any(_is_holder(self._tree.get(p), step) for p in places):
                        return
                break
            places, left = below, left[1:]
        for place in places:
            yield place, tuple(left)

    def _items(self, container: str, key: str | None, left: Path) -> Iterator[tuple[str, Path]]:
        """Yield the modules in a plain container, or at one key or attribute of it."""
        for name, module in self._tree.names.items():
            label = name.removeprefix(container)
            if label != name and label[:1] in (".", "["):
                item = label.strip(".[]'\"")
                if key is None or key == item:
                    yield self._tree.name(module), left

    @cached_property
    def _uses(self) -> dict[str, str]:
        """By module: a line that tests its class or reads what only it has."""
        found: dict[str, str] = {}
        for owner, _, code in self._owners:
            for use in code.tests:
                for name in self._tested(owner, use):
                    found.setdefault(name, f"{use.text} at {use.place} tests what it is")
            for use in code.reads:
                assert use.path is not None
                if len(use.path) < 2 or use.path[-1] in _HARMLESS:
                    continue
                for name, left in self._at(owner, use.path):
                    if name != owner and len(left) == 1:
                        found.setdefault(name, f"{use.text} at {use.place} reads of it")
        for module, how in self._tree.pinned.items():
            found.setdefault(self._tree.name(module), how)
        return found

    def _tested(self, owner: str, use: ModuleUse) -> Iterator[str]:
        if use.path is not None:
            for place, left in self._at(owner, use.path):
                if not left:
                    yield place
                    yield from self._below(place) if use.below else ()
            return
        for name, module in self._tree.modules():
            below = name != owner and (not owner or name.startswith(f"{owner}."))
            if below and isinstance(module, use.kinds):
                yield name

    def _below(self, place: str) -> Iterator[str]:
        return (
            name
            for name, _ in self._tree.modules()
            if name and (not place or name.startswith(f"{place}."))
        )

    @cached_property
    def _chosen(self) -> dict[str, str]:
        """By module: the line that chooses it by an attribute, where another was not traced."""
        found: dict[str, str] = {}
        for owner, _, code in self._owners:
            by_line: dict[tuple[str, str], set[str]] = {}
            for use in code.choices:
                assert use.path is not None
                names = {
                    name
                    for name, left in self._at(owner, use.path)
                    if not left and fnmatchcase(name.rpartition(".")[2], use.keys)
                }
                by_line.setdefault((use.text, use.place), set()).update(names - {owner})
            for (text, place), names in by_line.items():
                if names - self._called and names & self._called:
                    for name in names:
                        found.setdefault(name, f"{text} at {place} chooses it by an attribute")
            for use in code.elsewhere:
                for name, left in self._at(owner, use.path or ()):
                    if not left and name != owner and self._tree.aliases(name):
                        words = f"{use.text} is one of its names, and is assigned at {use.place}"
                        found.setdefault(name, words)
        return found

    @cached_property
    def _read_whole(self) -> dict[str, str]:
        """By module: a line that reads every tensor of it and below."""
        return {
            name: f"{use.text} at {use.place} reads all tensors of {name or 'the model'}"
            for owner, _, code in self._owners
            for use in code.tensors
            if use.path is not None
            for name, left in self._at(owner, use.path)
            if not left
        }

    @cached_property
    def _assigned(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for owner, _, code in self._owners:
            for use in code.assigned:
                for name, left in self._at(owner, use.path or ()):
                    if left and left[0] is not None:
                        found.setdefault(name, set()).add(left[0])
        return found

    def assigned(self, name: str) -> frozenset[str]:
        """Return the attributes of a module that some forward assigns or writes."""
        return frozenset(self._assigned.get(name, ()))

    def uneditable(self, name: str) -> str | None:
        """Return which line of a module's code would be lost with its forward, or None."""
        code = self._classes.get(type(self._tree.get(name)))
        if code is None:
            return None
        if code.contexts:
            return f"enters {code.contexts[0].text} at {code.contexts[0].place}"
        if code.stores:
            return f"assigns {code.stores[0].text} at {code.stores[0].place}"
        return None

    def exchanged(self, name: str) -> str | None:
        """Return why another module cannot take the place of `name` unnoticed, or None."""
        return self._uses.get(name) or self._chosen.get(name) or self.read_whole(name)

    def chosen(self, name: str) -> str | None:
        """Return which line chooses `name` by an attribute, though another was traced, or None."""
        return self._chosen.get(name)

    def read_whole(self, name: str) -> str | None:
        """Return which line reads every tensor of `name`, or of a module around it, or None."""
        if not self._read_whole:
            return None
        for place in (name, *self._tree.aliases(name)):
            parts = place.split(".") if place else []
            for length in range(len(parts), -1, -1):
                if (reason := self._read_whole.get(".".join(parts[:length]))) is not None:
                    return reason
        return None

    def other_entries(self, touched: frozenset[str]) -> Iterator[str]:
        """Yield the methods beside `forward` that read a module of `touched`, in words.

        But for what every model of transformers has: saving, giving out its embeddings.
        """
        for owner, module, code in self._owners:
            for method, paths in code.others.items():
                if _is_plumbing(type(module), method):
                    continue
                read = {n for path in paths for n, _ in self._at(owner, path)} & touched
                if named := sorted(read - {owner}):
                    kind = type(module).__name__
                    what = ", ".join(named)
                    yield f"{kind}.{method}() reads {what}, which changed: what it returns differs"


def _is_plumbing(kind: type[nn.Module], method: str) -> bool:
    """Return whether a method is one of transformers' own base classes."""
    where = str(getattr(getattr(kind, method, None), "__module__", ""))
    return where.startswith("transformers.") and not where.startswith("transformers.models.")


def _is_holder(module: nn.Module, attr: str) -> bool:
    """Return whether an attribute is a plain container or object, which may hold modules."""
    return attr in vars(module) and not isinstance(vars(module)[attr], bool | int | float | str)
