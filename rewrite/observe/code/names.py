"""What the names of a function hold, at the line that is read: the value, a part of it, or not.

    h, y = self.norm(x), z    "h" in names      out = Output(first=h)    of_name["out"] = {"first"}

An assignment changes it; a name that is bound to what cannot be told is refused.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from rewrite.observe.code.fields import (
    ANYWHERE,
    FORM,
    Fields,
    Untaken,
    excludes,
    fields_of_dict,
    joined,
)
from rewrite.observe.code.syntax import (
    Fixed,
    Function,
    constants,
    decided,
    has_call,
    known_values,
    path_of,
)
from rewrite.observe.export import CodeLine


class Surroundings(Protocol):
    """What the reader of a function needs to know of the calls around it."""

    def rank_of(self, function: Function) -> int:
        """Return how many axes the values of a function have at least."""

    def modules(self, function: Function) -> list[nn.Module]:
        """Return the modules whose forward a function may be a part of."""

    def reader_names(self, function: Function) -> set[str]:
        """Return the children of those modules on the way to a reader, or to the norm."""

    def reaches(self, function: Function, path: Sequence[str], chain: tuple[CodeLine, ...]) -> bool:
        """Return whether a call by that name reaches the norm, along a chain of lines."""

    def taken(self, file: str, node: ast.stmt) -> bool:
        """Return whether a call made a value, or called a module, on a line of a statement."""

    def moves(self, file: str, node: ast.stmt) -> bool:
        """Return whether a value that carries the map was made on a line of a statement."""

    def absorbs(self, function: Function, node: ast.stmt, path: Sequence[str]) -> bool:
        """Return whether what a call by that name returns is the output of a layer that reads."""

    def is_layer(self, function: Function, path: Sequence[str]) -> bool:
        """Return whether a call by that name is one of a layer that reads the value."""

    def callees(self, file: str, node: ast.stmt) -> list[Function]:
        """Return the functions that ran in what a statement called."""

    def read(
        self,
        function: Function,
        tainted: frozenset[str],
        chain: tuple[CodeLine, ...] = (),
        fixed: Fixed = frozenset(),
    ) -> tuple[bool, Fields]:
        """Read a function whose parameters `tainted` hold the value; does it return it, where?

        Its parameters `fixed` are at their defaults.
        """

    def inner(
        self, chain: tuple[CodeLine, ...], fixed: Callable[[Function], Fixed] = ...
    ) -> tuple[bool, Fields]:
        """Read the function in which the norm is called, further in; does it return its value?"""


class FunctionNames:
    """The names of one function, and what is known of them.

    Attributes:
        names: those that may hold the value.
        of_name: per name, the fields in which an object holds it; None: it may be the value itself.
        known: per name, the constant that it is.
        of_calls: the fields of what the calls of the expression returned that is read now.
    """

    def __init__(
        self, check: Surroundings, function: Function, names: set[str], chain: tuple[CodeLine, ...]
    ) -> None:
        self.check = check
        self.function = function
        self.names = names
        self.chain = chain
        self.known: dict[str, Any] = {}
        self.reaching: ast.Call | None = None
        self.of_name: dict[str, Fields] = {}
        self.of_calls: list[Fields] = []
        self.modules = check.modules(function)
        self.readers = check.reader_names(function)

    def fields_of(self, node: ast.expr) -> Fields:
        """Return in which fields an object holds the value; None if it may be anywhere."""
        if isinstance(node, ast.Name):
            return self.of_name.get(node.id)
        if isinstance(node, ast.Tuple | ast.List):
            held = {str(i) for i, part in enumerate(node.elts) if self.may(part)}
            starred = any(isinstance(part, ast.Starred) for part in node.elts)
            return frozenset({ANYWHERE} if starred else held)
        if isinstance(node, ast.BinOp) and self.adds_collections(node):
            return frozenset({ANYWHERE})
        if isinstance(node, ast.IfExp):
            return joined([self.fields_of(arm) for arm in (node.body, node.orelse)])
        if isinstance(node, ast.Dict):
            return fields_of_dict(node, self.may)
        if not isinstance(node, ast.Call):
            return None
        path = path_of(node.func)
        if path in (["tuple"], ["list"], ["dict"]):
            return frozenset({ANYWHERE})
        if len(path) == 1 and path[0][:1].isupper():
            if any(map(self.may, node.args)):
                return None
            keys = {k.arg for k in node.keywords if self.may(k.value)}
            return frozenset(ANYWHERE if key is None else key for key in keys)
        return joined(self.of_calls) if self.of_calls else None

    def holds(self, node: ast.AST) -> bool:
        """Return whether a name that may hold the value is in an expression."""
        return any(isinstance(n, ast.Name) and n.id in self.names for n in ast.walk(node))

    def may(self, node: ast.expr) -> bool:
        """Return whether the value, or the norm's call, is anywhere in an expression."""
        span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        calls = has_call(node)
        return self.mentions(node) or (bool(self.chain) and calls and self.chain[0].number in span)

    def mentions(self, node: ast.AST) -> bool:
        """Return whether a name that may hold the value is read, for more than its form."""
        if isinstance(node, ast.Attribute) and node.attr in FORM and path_of(node.value):
            return False
        if isinstance(node, ast.Name):
            return node.id in self.names
        return any(self.mentions(child) for child in ast.iter_child_nodes(node))

    def computes(self, node: ast.expr) -> bool:
        """Return whether an expression computes with the value."""
        for part in ast.walk(node):
            if isinstance(part, ast.BinOp) and self.adds_collections(part):
                continue
            if isinstance(part, ast.Call | ast.BinOp | ast.Subscript) and self.mentions(part):
                return True
        return False

    def is_collection(self, node: ast.expr) -> bool:
        """Return whether an expression is a tuple, a list or an object, and no value itself."""
        if isinstance(node, ast.Name):
            return node.id in self.names and self.of_name.get(node.id) is not None
        return isinstance(node, ast.Tuple | ast.List)

    def adds_collections(self, node: ast.BinOp) -> bool:
        """Return whether a sum is one of tuples or lists."""
        return any(self.is_collection(part) for part in (node.left, node.right))

    def decided(self, test: ast.expr) -> bool | None:
        """Return what a test is in every call of the function that is read here, or None."""
        return decided(test, self.modules, self.function.first, self.known)

    def known_value(self, node: ast.expr) -> list[Any]:
        """Return the one constant that an expression is, in a list; [] if that is not known."""
        return constants(known_values(node, self.modules, self.function.first, self.known))

    def taken(self, statement: ast.stmt) -> bool:
        """Return whether a call took a statement."""
        return self.check.taken(self.function.file, statement)

    def refuse(self, statement: ast.stmt) -> None:
        """Refuse the fold, with a statement."""
        text = ast.unparse(statement).splitlines()[0]
        raise Untaken(f"{self.at(statement)} may read it, and no call took it: {text[:80]}")

    def at(self, node: ast.stmt | ast.expr) -> str:
        """Return where a piece of code stands."""
        return f"{self.function.file.rpartition('/')[2]}:{node.lineno}"

    def bind(self, target: ast.expr, value: ast.expr | None, held: bool, node: ast.stmt) -> None:
        """Note what a target holds after an assignment of `value`, or of a part of something."""
        if isinstance(target, ast.Name):
            fields = self.fields_of(value) if value is not None and held else None
            grows = value is target and fields is not None  # by a method that keeps the value
            self.of_name[target.id] = frozenset({ANYWHERE}) if grows else fields
            self.known.pop(target.id, None)
            (self.names.add if held else self.names.discard)(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            values: Sequence[ast.expr | None] = [None] * len(target.elts)
            starred = any(isinstance(part, ast.Starred) for part in target.elts)
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) and not starred:
                values = value.elts
            known = value is not None and held and not starred
            fields = self.fields_of(value) if known and value is not None else None
            for place, (part, own) in enumerate(zip(target.elts, values, strict=True)):
                mine = self.may(own) if own else held and not excludes(fields, str(place))
                self.bind(part, own, mine, node)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, None, held, node)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and held:
            self.names.add(target.value.id)
            self.of_name[target.value.id] = None
        elif held:
            raise Untaken(f"{self.at(node)} keeps it as {ast.unparse(target)}")
