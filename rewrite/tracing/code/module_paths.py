"""Resolve expressions in a function's source to submodule paths below `self`.

    self.blocks[0].norm                        ("blocks", "0", "norm")
    bn = getattr(self, "bn")                   bn is ("bn",) from there on
    for block in self.blocks:                  block is ("blocks", None): any item

Code in which a name refers to several modules in turn is analyzed once for each of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

Path = tuple[str | None, ...]
"""Attributes and keys below `self`; None for a key that the code does not spell."""

_READINGS = 8
"""How many modules one name may stand for (`node = node.next` has no end)."""


class ModulePaths:
    """The names in one function that refer to modules, starting from `given`, its arguments."""

    def __init__(self, given: Mapping[str, Path]) -> None:
        self._names: dict[str, list[Path]] = {name: [path] for name, path in given.items()}
        self._reading = 0

    def of(self, node: ast.AST) -> Path | None:
        """Return the path that an expression refers to; None if it is not below `self`."""
        if isinstance(node, ast.Name):
            paths = self._names.get(node.id)
            return None if paths is None else paths[min(self._reading, len(paths) - 1)]
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
        if called(node) == "vars" and isinstance(node, ast.Call) and node.args:
            path = self.of(node.args[0])
            return None if path is None else (*path, "__dict__")
        return None

    def readings(self, tree: ast.AST) -> Iterator[int]:
        """Bind local names to modules, and step through the combinations of what they refer to."""
        while self._reading < max(map(len, self._names.values()), default=1):
            for _ in range(2):  # an alias of an alias
                self._aliases(tree)
            yield self._reading
            self._reading += 1
        self._reading = 0

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
                    paths = self._names.setdefault(target.id, [])
                    if path not in paths and len(paths) < _READINGS:
                        paths.append(path)

    def _pairs(self, target: ast.AST, value: ast.AST) -> Iterator[tuple[ast.AST, Path | None]]:
        """Yield the targets of an assignment, each with the path that it refers to."""
        parts = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        items = value.elts if isinstance(value, ast.Tuple | ast.List) else []
        if parts and len(parts) == len(items):
            for part, item in zip(parts, items, strict=True):
                yield from self._pairs(part, item)
        else:
            yield target, self.of(value)

    def _items(self, target: ast.AST, source: ast.AST) -> Iterator[tuple[ast.AST, Path | None]]:
        """Yield the targets of a loop, each with the path of the items."""
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


def looked_at(node: ast.AST) -> tuple[ast.expr, bool] | None:
    """Return the expression whose type or attributes `node` inspects, and if submodules count.

    `type(m)`, `dir(m)` and `match m:` inspect one module; `str(m)`, `f"{m}"` and `m.apply(f)` all
    of its submodules as well. None for other code.
    """
    if isinstance(node, ast.Match):
        return node.subject, False
    if isinstance(node, ast.FormattedValue):
        return node.value, True
    if not isinstance(node, ast.Call):
        return None
    name = called(node)
    if name in ("apply", "modules", "named_modules") and isinstance(node.func, ast.Attribute):
        return node.func.value, True
    if not node.args:
        return None
    first: ast.expr = node.args[0]
    if called(node.func) in ("attrgetter", "methodcaller"):
        return first, True
    if name not in _LOOKS_AT or not isinstance(node.func, ast.Name):
        return None
    inner = first.args[0] if isinstance(first, ast.Call) and first.args else first
    return inner, _LOOKS_AT[name]


_LOOKS_AT = {
    "isinstance": False, "issubclass": False, "hasattr": False, "type": False, "dir": False,
    "vars": False, "str": True, "repr": True, "format": True, "ascii": True,
}  # fmt: skip
"""What looks at a module, and whether at all below it."""


def called(node: ast.AST) -> str:
    """Return the last name of a call's function ("relu" of `F.relu(x)`); "" for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    return str(getattr(node.func, "id", getattr(node.func, "attr", "")))


def pattern_of(key: ast.expr) -> str:
    """Return a pattern of the strings an expression may be: "bn_*" of `f"bn_{self.domain}"`."""
    if isinstance(key, ast.Constant):
        return str(key.value)
    if isinstance(key, ast.JoinedStr):
        return "".join(map(pattern_of, key.values))
    if isinstance(key, ast.BinOp) and isinstance(key.op, ast.Add):
        return pattern_of(key.left) + pattern_of(key.right)
    return "*"


def classes_of(node: ast.AST, namespace: Mapping[str, Any]) -> tuple[type, ...]:
    """Return the module classes that the second argument of `isinstance` names."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    found = []
    for part in parts:
        names = ast.unparse(part).split(".")
        value: Any = namespace.get(names[0])
        for name in names[1:]:
            value = getattr(value, name, None)
        found += [value] if isinstance(value, type) and issubclass(value, nn.Module) else []
    return tuple(found)


def only_watches(node: ast.With) -> bool:
    """Return whether a context only profiles or annotates its body (`record_function`)."""
    return all(
        "record_function" in (text := ast.unparse(item.context_expr)) or "profiler" in text
        for item in node.items
    )
