"""Resolve expressions in a function's source to submodule paths below `self`.

    self.blocks[0].norm                        ("blocks", "0", "norm")
    bn = getattr(self, "bn")                   bn is ("bn",) from there on
    for block in self.blocks:                  block is ("blocks", None): any item

A name keeps the first module that the code gives it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

Path = tuple[str | None, ...]
"""Attributes and keys below `self`; None for a key that the code does not spell."""


class ModulePaths:
    """The names of one function that stand for modules; `given` are those of its arguments."""

    def __init__(self, given: Mapping[str, Path]) -> None:
        self._names: dict[str, Path] = dict(given)

    def of(self, node: ast.AST) -> Path | None:
        """Return what an expression stands for; None where that is nothing below `self`."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            path = self.of(node.value)
            return None if path is None else (*path, node.attr)
        if isinstance(node, ast.Subscript):
            path = self.of(node.value)
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            return None if path is None else (*path, None if key is None else str(key))
        if called(node) == "getattr":
            assert isinstance(node, ast.Call)
            path = self.of(node.args[0])
            name = node.args[1]
            key = str(name.value) if isinstance(name, ast.Constant) else None
            return None if path is None else (*path, key)
        return None

    def learn(self, tree: ast.AST) -> None:
        """Add the names that the code of the function itself gives to modules."""
        for _ in range(2):  # an alias of an alias
            self._aliases(tree)

    def _aliases(self, tree: ast.AST) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                pairs = [
                    pair for target in node.targets for pair in self._pairs(target, node.value)
                ]
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                pairs = [(node.target, self.of(node.value))]
            elif isinstance(node, ast.For | ast.comprehension):
                pairs = list(self._items(node.target, node.iter))
            else:
                continue
            for target, path in pairs:
                if isinstance(target, ast.Name) and path is not None:
                    self._names.setdefault(target.id, path)

    def _pairs(self, target: ast.AST, value: ast.AST) -> Iterator[tuple[ast.AST, Path | None]]:
        """Yield the names of an assignment, and what each of them stands for."""
        parts = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        items = value.elts if isinstance(value, ast.Tuple | ast.List) else []
        if parts and len(parts) == len(items):
            for part, item in zip(parts, items, strict=True):
                yield from self._pairs(part, item)
        else:
            yield target, self.of(value)

    def _items(self, target: ast.AST, source: ast.AST) -> Iterator[tuple[ast.AST, Path | None]]:
        """Yield the names of a loop, and the items that they stand for."""
        if isinstance(source, ast.Call) and isinstance(target, ast.Tuple):
            name = called(source)
            if name == "zip":
                for part, value in zip(target.elts, source.args, strict=False):
                    yield from self._items(part, value)
                return
            if name == "enumerate" and len(target.elts) == 2:
                yield from self._items(target.elts[1], source.args[0])
                return
            if name in ("items", "named_children") and len(target.elts) == 2:
                path = self.of(getattr(source.func, "value", source))
                yield target.elts[1], None if path is None else (*path, None)
                return
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute):
            path = self.of(source.func.value)
            wanted = source.func.attr in ("values", "children")
            yield target, (*path, None) if path is not None and wanted else None
            return
        path = self.of(source)
        yield target, None if path is None else (*path, None)


def called(node: ast.AST) -> str:
    """Return the last name of what a call calls; "" for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return str(getattr(node.func, "id", getattr(node.func, "attr", "")))
