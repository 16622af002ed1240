"""Tell embedding look-ups by position from look-ups by data, in the code of a class.

    self.places(torch.arange(n)), self.places(self.ids[:, :n])    positions: the same for all inputs
    self.words(ids)                                               data

Used for forwards that cannot be traced. Every value is one of three kinds: positions (`arange`,
`cumsum`, a buffer of integers that are not all equal, and what is computed from those), data (a
required argument, and what is computed from it), or neither (a constant, a size, an optional
argument). In a sum data dominates: `ids + offsets` is data. A product with positions is positions:
`cumsum(mask) * mask`, the positions of tokens that are not padding.
"""

from __future__ import annotations

import ast
import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from rewrite.tracing.code.source import functions_in

_COUNTING = frozenset({"arange", "cumsum", "linspace", "range"})
_SIZES = frozenset({"shape", "size", "device", "dtype", "ndim", "dim", "numel", "len"})
_FILLED = frozenset(
    {"zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "new_zeros",
     "new_ones", "new_full"}
)  # fmt: skip
_DEEPEST = 3
"""So many methods and constructors are read within one another."""

_LIBRARY = "torch.nn.modules"


class Kind(enum.IntEnum):
    """The kind of a value; that of a sum is the largest of its terms'."""

    NEITHER = 0
    COUNTS = 1
    DATA = 2


def looks_up_positions(holder: nn.Module, key: str) -> bool:
    """Return whether `self.key` is called with positions in the code of `holder`.

    At least one call has to get positions, and none data. With key "", `holder` is an embedding
    with a forward of its own, and the calls are the look-ups of its base class or in its weight.
    """
    functions = _functions(type(holder))
    found = {
        _Values(holder, functions, function, _arguments(function)).looked_up(node)
        for function in functions.values()
        for node in ast.walk(function)
        if _is_look_up(node, key)
    }
    return Kind.COUNTS in found and Kind.DATA not in found


def read_whole(holder: nn.Module, key: str) -> bool:
    """Return whether the code of `holder` reads `self.key.weight`, and nothing else of `self.key`.

    Then the table of an embedding is a parameter like any other: DETR's queries, Siglip 2's
    positions, which are resized and added.
    """
    found = False
    for function in _functions(type(holder)).values():
        whole = {
            id(node.value)
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and node.attr == "weight"
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{key}":
                if id(node) not in whole:
                    return False
                found = True
            looks_up = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "embedding"
            if looks_up and f"self.{key}.weight" in ast.unparse(node):
                return False
    return found


def _is_look_up(node: ast.AST, key: str) -> bool:
    if isinstance(node, ast.Subscript):
        return not key and ast.unparse(node.value) == "self.weight"
    if not isinstance(node, ast.Call) or not node.args:
        return False
    called = node.func
    if not isinstance(called, ast.Attribute):
        return False
    if not key:
        return called.attr == "embedding" or (
            called.attr == "forward" and ast.unparse(called.value).startswith("super(")
        )
    return called.attr == key and ast.unparse(called.value) == "self"


def _functions(kind: type) -> dict[str, ast.FunctionDef]:
    """Return the methods of a class by name, those of its own bases too."""
    found: dict[str, ast.FunctionDef] = {}
    for node in functions_in(kind, _LIBRARY):
        if node.name != "__init__":
            found.setdefault(node.name, node)
    return found


def _registered(constructor: ast.FunctionDef, name: str) -> Iterator[ast.expr]:
    """Yield what a constructor registers as the buffer `name`, or assigns to `self.name`."""
    for node in ast.walk(constructor):
        if isinstance(node, ast.Assign):
            if any(ast.unparse(target) == f"self.{name}" for target in node.targets):
                yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
            given = dict(zip(("name", "tensor"), node.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            key = given.get("name")
            if isinstance(key, ast.Constant) and key.value == name and "tensor" in given:
                yield given["tensor"]


def _arguments(function: ast.FunctionDef) -> dict[str, Kind]:
    """Return the kinds of a function's arguments: data if they are required."""
    places = [*function.args.posonlyargs, *function.args.args]
    needed = places[: len(places) - len(function.args.defaults)]
    found = {argument.arg: Kind.NEITHER for argument in (*places, *function.args.kwonlyargs)}
    return found | {argument.arg: Kind.DATA for argument in needed if argument.arg != "self"}


@dataclass
class _Values:
    """The kinds of the values in one function, given those of its arguments."""

    holder: nn.Module
    functions: Mapping[str, ast.FunctionDef]
    function: ast.FunctionDef
    given: Mapping[str, Kind]
    depth: int = 0
    _open: dict[str, Kind] = field(default_factory=dict)

    def looked_up(self, node: ast.AST) -> Kind:
        """Return the kind of the index of a look-up; a slice of consecutive rows is positions."""
        if isinstance(node, ast.Subscript):
            return Kind.COUNTS if isinstance(node.slice, ast.Slice) else self.of(node.slice)
        assert isinstance(node, ast.Call)
        return self.of(node.args[0])

    def of(self, node: ast.expr) -> Kind:
        """Return the kind of an expression."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript):
            return self.of(node.value)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp):
            kinds = (self.of(node.left), self.of(node.right))
            if isinstance(node.op, ast.Mult) and Kind.COUNTS in kinds:
                return Kind.COUNTS
            return max(kinds)
        if isinstance(node, ast.IfExp):
            return max(self.of(node.body), self.of(node.orelse))
        parts = (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))
        return max(map(self.of, parts), default=Kind.NEITHER)

    def _name(self, name: str) -> Kind:
        """Return the largest kind assigned to a name; `x = x * y` reads the x before it."""
        if name in self._open:
            return self._open[name]
        self._open[name] = self.given.get(name, Kind.NEITHER)
        assigned = list(self._assigned(name))
        try:
            for value in sorted(assigned, key=lambda value: _mentions(value, name)):
                self._open[name] = max(self._open[name], self.of(value))
            return self._open[name]
        finally:
            del self._open[name]

    def _assigned(self, name: str) -> Iterator[ast.expr]:
        """Yield the expressions assigned to a name anywhere in the function."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Assign):
                targets: Iterable[ast.expr] = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
                targets = [node.target]
            else:
                continue
            names = (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
            if node.value is not None and name in names:
                yield node.value

    def _attribute(self, node: ast.Attribute) -> Kind:
        if node.attr in _SIZES:
            return Kind.NEITHER
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            buffer = self.holder._buffers.get(node.attr)
            if buffer is not None and buffer.is_meta and not buffer.is_floating_point():
                return self._written(node.attr)
            return _counting(buffer)
        return self.of(node.value)

    def _written(self, name: str) -> Kind:
        """Return what a constructor makes a buffer of: on the device meta it has no values."""
        if self.depth >= _DEEPEST:  # `self.ids = self.ids + 1` reads what it writes
            return Kind.NEITHER
        kind: type = type(self.holder)
        for constructor in (f for f in functions_in(kind, _LIBRARY) if f.name == "__init__"):
            inner = _Values(self.holder, self.functions, constructor, {}, self.depth + 1)
            if made := [inner.of(value) for value in _registered(constructor, name)]:
                return max(made)
        return Kind.NEITHER

    def _call(self, node: ast.Call) -> Kind:
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in _COUNTING:
            return Kind.COUNTS
        if name in _SIZES or name in _FILLED:
            return Kind.NEITHER
        own = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
        if own and name in self.functions and self.depth < _DEEPEST:
            return self._returned(self.functions[name], node)
        kinds = [self.of(part) for part in (*node.args, *(k.value for k in node.keywords))]
        if isinstance(called, ast.Attribute):
            kinds.append(self.of(called.value))
        return max(kinds, default=Kind.NEITHER)

    def _returned(self, function: ast.FunctionDef, call: ast.Call) -> Kind:
        """Return the kind of what a method of the class returns for the arguments of a call."""
        places = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        places = places[1:] if places[:1] == ["self"] else places
        given = dict(zip(places, map(self.of, call.args), strict=False))
        given |= {k.arg: self.of(k.value) for k in call.keywords if k.arg is not None}
        inner = _Values(self.holder, self.functions, function, given, self.depth + 1)
        returned = (n.value for n in ast.walk(function) if isinstance(n, ast.Return))
        return max(
            (inner.of(value) for value in returned if value is not None), default=Kind.NEITHER
        )


def _mentions(value: ast.expr, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(value))


def _counting(buffer: torch.Tensor | None) -> Kind:
    """Return the kind of a buffer: positions if it holds integers, not all equal."""
    if buffer is None or buffer.is_floating_point() or buffer.is_meta or buffer.numel() < 2:
        return Kind.NEITHER
    return Kind.COUNTS if bool((buffer != buffer.flatten()[0]).any()) else Kind.NEITHER
