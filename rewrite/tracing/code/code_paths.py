"""The code of all classes of a model, with the modules of the model that its paths refer to.

Each class is analyzed once (`class_code`), in terms of paths below `self`; here these are resolved
in the model's tree to qualified names of modules.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from torch import nn

from rewrite.nn.edited import original_class
from rewrite.runtime.tree import Tree, join
from rewrite.tracing.code.class_code import ClassCode, code_of
from rewrite.tracing.code.handed import with_handed
from rewrite.tracing.code.module_paths import Path


class Reading(NamedTuple):
    """What some code does with a module and those below it.

    Attributes:
        owner, module: what the paths of the analysis begin at.
        code: the analysis.
        own: whether it is the code of the module's own class, or of a function that was given it.
    """

    owner: str
    module: nn.Module
    code: ClassCode
    own: bool = True


class CodePaths:
    """The analyzed classes of a model, and the resolution of their paths.

    Args:
        tree: the modules of the model.
        given: the analyses of functions that ran with modules of it, by the module's name.
    """

    def __init__(self, tree: Tree, given: Iterable[tuple[str, ClassCode]] = ()) -> None:
        self._tree = tree
        self._given = given

    @cached_property
    def classes(self) -> dict[type, ClassCode]:
        """The analysis of each class of the model that is not one of torch."""
        kinds = {type(module) for _, module in self._tree.modules()}
        own = (
            k for k in kinds if not k.__module__.startswith(("torch.nn", "torch.ao", "torch.fx"))
        )
        return {kind: code_of(kind) for kind in own}

    @cached_property
    def readings(self) -> list[Reading]:
        """The analyses of all code, that of classes first."""
        found = list(self.owners)
        for name, code in self._given:
            if name not in self._tree.names:
                continue  # an edit has removed it
            module = self._tree.get(name)
            code = with_handed(module, code) if code.handed else code
            found.append(Reading(name, module, code, own=False))
        return found

    @cached_property
    def owners(self) -> list[Reading]:
        """The modules whose class was analyzed."""
        found = []
        for name, module in self._tree.modules():
            kind = original_class(type(module))
            if (code := self.classes.get(type(module)) or self.classes.get(kind)) is not None:
                code = with_handed(module, code) if code.handed else code
                found.append(Reading(name, module, code))
        return found

    def at(self, owner: str, path: Path) -> Iterator[tuple[str, Path]]:
        """Yield the modules that `path` leads to from `owner`, each with the rest of the path."""
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

    def reads_of(self, name: str, attributes: Container[str]) -> str | None:
        """Return which line reads one of these attributes of a module, or None."""
        for owner, _, code, _ in self.readings:
            for use in code.reads:
                if use.path is None or use.path[-1] not in attributes:
                    continue
                if any(
                    place == name and len(left) == 1 for place, left in self.at(owner, use.path)
                ):
                    return f"{use.text} at {use.place}"
        return None

    def below(self, place: str) -> Iterator[str]:
        """Yield the names of the modules below the one at `place`."""
        return (
            name
            for name, _ in self._tree.modules()
            if name and (not place or name.startswith(f"{place}."))
        )


def _is_holder(module: nn.Module, attr: str) -> bool:
    """Return whether an attribute is a plain container or object, which may hold modules."""
    return attr in vars(module) and not isinstance(vars(module)[attr], bool | int | float | str)
