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
    UnobservedLine,
    fields_of_dict,
    joined,
)
from rewrite.observe.code.state import Other, Returned, State
from rewrite.observe.code.syntax import (
    Fixed,
    Function,
    constants,
    decided,
    has_call,
    known_values,
)
from rewrite.observe.export import CodeLine
from rewrite.tracing.taint import path_of

Others = frozenset[tuple[str, Other]]
"""Parameters that may be another value than the one that is followed."""


class CodeContext(Protocol):
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

    def reads_on(self, file: str, node: ast.stmt) -> bool:
        """Return whether a layer that absorbs the map reads it on a line of a statement."""

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
        others: Others = frozenset(),
    ) -> Returned:
        """Read a function whose parameters `tainted` hold the value; does it return it, where?

        Its parameters `fixed` are at their defaults, and `others` may be other values.
        """

    def inner(
        self,
        chain: tuple[CodeLine, ...],
        fixed: Callable[[Function], Fixed] = ...,
        others: Callable[[Function], Others] = ...,
    ) -> Returned:
        """Read the function in which the norm is called, further in; does it return its value?"""

    def note_given(self, name: str, place: str) -> None:
        """Note that an argument of the model stands for the value, and is given by its caller."""


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


class FunctionNames(State):
    """The names of one function, and what is known of them at the line that is read.

    Attributes:
        bound: the names that it binds anywhere.
        of_calls: the fields of what the calls of the expression returned that is read now.
    """

    def __init__(
        self, check: CodeContext, function: Function, names: set[str], chain: tuple[CodeLine, ...]
    ) -> None:
        super().__init__(names)
        self.check = check
        self.function = function
        self.chain = chain
        self.reaching: ast.Call | None = None
        self.of_calls: list[Fields] = []
        args = function.node.args
        self.bound = {
            *function.parameters,
            *(a.arg for a in (args.vararg, args.kwarg) if a is not None),
            *(n.id for n in ast.walk(function.node) if isinstance(n, ast.Name) and _is_stored(n)),
        }
        self.modules = check.modules(function)
        self.readers = check.reader_names(function)

    def enter(self, state: State) -> None:
        """Go on with what is known at another line."""
        own = state.copy()
        self.names, self.of_name = own.names, own.of_name
        self.known, self.others = own.known, own.others

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
        raise UnobservedLine(f"{self.at(statement)} may read it, and no call took it: {text[:80]}")

    def at(self, node: ast.stmt | ast.expr) -> str:
        """Return where a piece of code stands."""
        return f"{self.function.file.rpartition('/')[2]}:{node.lineno}"
