"""Find uses of a module in model code other than calls to it: reads, aliases, attribute access.

Each class is read once (`class_code`); what it does with a path below `self` is looked up in the
tree, so that the answers are about modules by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from rewrite.runtime.tree import Tree
from rewrite.tracing.altered import UNUSED_IN_EVAL
from rewrite.tracing.code.class_code import ClassCode, ModuleUse
from rewrite.tracing.code.code_paths import CodePaths

_PARAMETERS = frozenset({"weight", "bias"})
_HARMLESS = frozenset({"forward", "__call__", "training"}) | _PARAMETERS


@dataclass(frozen=True)
class OtherEntry:
    """A method beside `forward`, and the modules that it reads, by name."""

    method: str
    reads: frozenset[str]


class ModelCode(CodePaths):
    """The code of the classes of a model, and what it says about each module.

    Args:
        tree: the modules of the model.
        called: the names of the modules that some traced forward calls or enters.
        given: the analyses of functions that ran with modules of the model, by the module's name.
    """

    def __init__(
        self, tree: Tree, called: frozenset[str], given: Iterable[tuple[str, ClassCode]] = ()
    ) -> None:
        super().__init__(tree, given)
        self._called = called

    @cached_property
    def _uses(self) -> dict[str, str]:
        """By module: a line that tests its class or reads what only it has."""
        found: dict[str, str] = {}
        for owner, _, code, own in self.readings:
            for use in code.tests:
                for name in self._tested(owner, use):
                    found.setdefault(name, f"{use.text} at {use.place} tests what it is")
            for use in code.reads:
                assert use.path is not None
                if (own and len(use.path) < 2) or use.path[-1] in _HARMLESS:
                    continue
                for name, left in self.at(owner, use.path):
                    if not (own and name == owner) and len(left) == 1:
                        found.setdefault(name, f"{use.text} at {use.place} reads of it")
        for module, how in self._tree.pinned.items():
            found.setdefault(self._tree.name(module), how)
        return found

    def _tested(self, owner: str, use: ModuleUse) -> Iterator[str]:
        if use.path is not None:
            for place, left in self.at(owner, use.path):
                if not left:
                    yield place
                    yield from self.below(place) if use.below else ()
            return
        for name, module in self._tree.modules():
            below = name != owner and (not owner or name.startswith(f"{owner}."))
            if below and isinstance(module, use.kinds):
                yield name

    @cached_property
    def _chosen(self) -> dict[str, str]:
        """By module: the line that chooses it by an attribute, where another was not traced."""
        found: dict[str, str] = {}
        for owner, _, code, _ in self.readings:
            by_line: dict[tuple[str, str], set[str]] = {}
            for use in code.choices:
                assert use.path is not None
                names = {
                    name
                    for name, left in self.at(owner, use.path)
                    if not left and fnmatchcase(name.rpartition(".")[2], use.keys)
                }
                by_line.setdefault((use.text, use.place), set()).update(names - {owner})
            for (text, place), names in by_line.items():
                if names - self._called and names & self._called:
                    for name in names:
                        found.setdefault(name, f"{text} at {place} chooses it by an attribute")
            for use in code.elsewhere:
                for name, left in self.at(owner, use.path or ()):
                    if not left and name != owner and self._tree.aliases(name):
                        words = f"{use.text} is one of its names, and is assigned at {use.place}"
                        found.setdefault(name, words)
        return found

    @cached_property
    def _read_whole(self) -> dict[str, str]:
        """By module: a line that reads every tensor of it and below."""
        return {
            name: f"{use.text} at {use.place} reads all tensors of {name or 'the model'}"
            for owner, _, code, _ in self.readings
            for use in code.tensors
            if use.path is not None
            for name, left in self.at(owner, use.path)
            if not left
        }

    @cached_property
    def _assigned(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for owner, _, code, _ in self.readings:
            for use in code.assigned:
                for name, left in self.at(owner, use.path or ()):
                    if left and left[0] is not None:
                        found.setdefault(name, set()).add(left[0])
        return found

    def assigned(self, name: str) -> frozenset[str]:
        """Return the attributes of a module that some forward assigns or writes."""
        return frozenset(self._assigned.get(name, ()))

    @cached_property
    def _altered(self) -> dict[str, str]:
        """By module: the line of a forward that assigns an attribute of it, or its place."""
        found: dict[str, str] = {}
        for owner, _, code, own in self.readings:
            for use in code.assigned:
                for name, left in self.at(owner, use.path or ()):
                    if own and name == owner:
                        continue
                    if not left:
                        for below in (name, *self.below(name)):
                            found.setdefault(below, f"{use.text} is assigned at {use.place}")
                    elif left[0] not in UNUSED_IN_EVAL and self._has(name, left[0]):
                        found.setdefault(name, f"{use.text} is assigned at {use.place}")
            for use in code.moved:
                for name, left in self.at(owner, (*(use.path or ()), None)):
                    if not left and not (own and name == owner):
                        for below in (name, *self.below(name)):
                            found.setdefault(below, f"{use.text} at {use.place} may move it")
        return found

    def _has(self, name: str, attr: str | None) -> bool:
        """Return whether a layer has an attribute by itself, before a forward assigns it."""
        module = self._tree.get(name)
        held = (vars(module), module._parameters, module._buffers)
        return attr is None or any(attr in each for each in held)

    def altered(self, name: str) -> str | None:
        """Return which line of a forward alters `name` or puts it elsewhere, or None."""
        return self._altered.get(name)

    def chosen(self, name: str) -> str | None:
        """Return which line chooses `name` by an attribute, though another was traced, or None."""
        return self._chosen.get(name)

    def uneditable(self, name: str) -> str | None:
        """Return which line of a module's code would be lost with its forward, or None."""
        code = self.classes.get(type(self._tree.get(name)))
        if code is None:
            return None
        if code.contexts:
            return f"enters {code.contexts[0].text} at {code.contexts[0].place}"
        if code.stores:
            return f"assigns {code.stores[0].text} at {code.stores[0].place}"
        return None

    def used(self, name: str) -> str | None:
        """Return which line tests what `name` is, or reads what only it has, or None."""
        return self._uses.get(name)

    def exchanged(self, name: str) -> str | None:
        """Return why another module cannot take the place of `name` unnoticed, or None."""
        return self._uses.get(name) or self._chosen.get(name) or self.read_whole(name)

    def counted(self, name: str) -> str | None:
        """Return which line sees that a layer becomes one of its class with a module below it.

        `isinstance` does not: a parametrized layer is of its class still.
        """
        return self._counted.get(name)

    @cached_property
    def _counted(self) -> dict[str, str]:
        return {
            name: f"{use.text} at {use.place} tests what it is"
            for owner, _, code, _ in self.readings
            for use in code.tests
            if use.below or not use.text.startswith(("isinstance(", "issubclass(", "hasattr("))
            for name in self._tested(owner, use)
        }

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

    @cached_property
    def other_entries(self) -> tuple[OtherEntry, ...]:
        """The methods beside `forward`, and the modules that each of them reads.

        But for what every model of transformers has: saving, giving out its embeddings. To be asked
        before the model is edited: modules may go, and with them the way to others.
        """
        return tuple(
            OtherEntry(f"{type(module).__name__}.{method}()", frozenset(read - {owner}))
            for owner, module, code, _ in self.owners
            for method, paths in code.others.items()
            if not _is_plumbing(type(module), method)
            and (read := {name for path in paths for name, _ in self.at(owner, path)})
        )


def _is_plumbing(kind: type[nn.Module], method: str) -> bool:
    """Return whether a method is one of transformers' own base classes."""
    where = str(getattr(getattr(kind, method, None), "__module__", ""))
    return where.startswith("transformers.") and not where.startswith("transformers.models.")
