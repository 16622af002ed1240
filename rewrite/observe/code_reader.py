"""One function, read statement by statement: which of its names may hold a value, and who reads it.

    h = self.norm(x)      h holds it          h = self.q_proj(h)     h no longer does
    a = (h, y); a[0]      a holds it          h.shape                is not the value

Branches that the model itself has decided are left out; of the others, both are read. A statement
that no call took may hand the value on; if it computes with it, it is refused.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rewrite.observe.code_constants import decided, lacks
from rewrite.observe.export import CodeLine

_FORM = frozenset(
    {"size", "dim", "numel", "stride", "is_contiguous", "element_size", "get_device", "type",
     "shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "ndimension",
     "is_floating_point"}
)  # fmt: skip
_HARMLESS = frozenset(
    {"isinstance", "len", "type", "id", "print", "hasattr", "getattr", "callable", "repr", "str"}
)
_KEEPS = frozenset({"append", "extend", "add", "insert", "update", "setdefault"})
_TALKS = frozenset({"logger", "warnings", "logging"})


class Untaken(Exception):  # noqa: N818 - a reason, caught where it is decided
    """A line that no observed call took reads the value, or calls a reader of it."""


@dataclass(frozen=True, eq=False)
class Function:
    """A function of a file, and the class that it stands in.

    Attributes:
        file: the path of the file.
        node: its definition.
        inside: the name of its class, or "".
    """

    file: str
    node: ast.FunctionDef
    inside: str

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it."""
        return self.file, self.node.lineno

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters, but for those that take any number."""
        args = self.node.args
        return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]

    @property
    def passes_on(self) -> bool:
        """Whether it takes whatever it is given: a decorator's inner function."""
        return self.node.args.vararg is not None

    @property
    def first(self) -> str:
        """The name of its first parameter."""
        return self.parameters[0] if self.parameters else ""


Fields = frozenset[str] | None
"""In which fields an object holds a value; None: it may be anywhere in it."""


def _joined(parts: Sequence[Fields]) -> Fields:
    known = [part for part in parts if part is not None]
    return frozenset().union(*known) if len(known) == len(parts) else None


class Surroundings(Protocol):
    """What the reader of a function needs to know of the calls around it."""

    def modules(self, function: Function) -> list[nn.Module]:
        """Return the modules whose forward a function may be a part of."""

    def reader_names(self, function: Function) -> set[str]:
        """Return the children of those modules on the way to a reader, or to the norm."""

    def taken(self, file: str, node: ast.stmt) -> bool:
        """Return whether a call made a value, or called a module, on a line of a statement."""

    def moves(self, file: str, node: ast.stmt) -> bool:
        """Return whether a value that carries the map was made on a line of a statement."""

    def absorbs(self, function: Function, node: ast.stmt, path: Sequence[str]) -> bool:
        """Return whether what a call by that name returns is the output of a layer that reads."""

    def callees(self, file: str, node: ast.stmt) -> list[Function]:
        """Return the functions that ran in what a statement called."""

    def read(
        self, function: Function, tainted: frozenset[str], chain: tuple[CodeLine, ...] = ()
    ) -> tuple[bool, Fields]:
        """Read a function whose parameters `tainted` hold the value; does it return it, where?"""

    def inner(self, chain: tuple[CodeLine, ...]) -> tuple[bool, Fields]:
        """Read the function in which the norm is called, further in; does it return its value?"""


class FunctionReader:
    """Reads one function, statement by statement: which names may hold the value."""

    def __init__(
        self, check: Surroundings, function: Function, names: set[str], chain: tuple[CodeLine, ...]
    ) -> None:
        self.check = check
        self.function = function
        self.names = names
        self.chain = chain
        self.returns = False
        self.fields: Fields = frozenset()
        self._of_name: dict[str, Fields] = {}
        self._of_calls: list[Fields] = []
        self.modules = check.modules(function)
        self.readers = check.reader_names(function)

    # -- statements ---------------------------------------------------------------------------

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Read statements in their order; return whether the last of them is never passed."""
        for statement in statements:
            if isinstance(statement, ast.If):
                if self._if(statement):
                    return True
                continue
            self._statement(statement)
            if isinstance(statement, ast.Return | ast.Raise | ast.Continue | ast.Break):
                return True
        return False

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
            self._compound(node)
        elif isinstance(node, ast.Return):
            if node.value is not None and self._value(node.value, node):
                self.returns = True
                self.fields = _joined([self.fields, self._fields(node.value)])
        elif isinstance(node, ast.Assign):
            held = self._value(node.value, node)
            for target in node.targets:
                self._bind(target, node.value, held, node)
                if isinstance(target, ast.Name):
                    self._of_name[target.id] = self._fields(node.value)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
            held = self._value(node.value, node)
            if isinstance(node, ast.AugAssign):
                held = self._augmented(node, held)
            self._bind(node.target, node.value, held, node)
            if isinstance(node.target, ast.Name) and isinstance(node, ast.AnnAssign):
                self._of_name[node.target.id] = self._fields(node.value)
        elif isinstance(node, ast.Expr):
            self._value(node.value, node)
        elif isinstance(node, ast.Delete):
            self.names -= {t.id for t in node.targets if isinstance(t, ast.Name)}

    def _if(self, node: ast.If) -> bool:
        """Read both branches, or the one that the model has decided on; is neither ever left?"""
        self._value(node.test, node)
        known = decided(node.test, self.modules, self.function.first) if self.modules else None
        before = set(self.names)
        after: set[str] = set()
        ends = True
        for wanted, body in ((True, node.body), (False, node.orelse)):
            if known is not None and known is not wanted:
                continue
            self.names = set(before)
            if not self.block(body):
                after |= self.names
                ends = False
        self.names = after
        return ends

    def _compound(self, node: ast.For | ast.While | ast.With | ast.Try) -> None:
        if isinstance(node, ast.For):
            held = self._value(node.iter, node)
            self._bind(node.target, node.iter, held, node)
        elif isinstance(node, ast.While):
            self._value(node.test, node)
        bodies = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
        bodies += [handler.body for handler in getattr(node, "handlers", [])]
        for _ in range(2 if isinstance(node, ast.For | ast.While) else 1):
            before = set(self.names)
            for body in bodies:
                self.block(body)
            if isinstance(node, ast.For | ast.While):
                self.names |= before

    def _augmented(self, node: ast.AugAssign, held: bool) -> bool:
        old = isinstance(node.target, ast.Name) and node.target.id in self.names
        if held and isinstance(node.value, ast.Tuple | ast.List):
            return True  # a list of outputs
        if (held or old) and not self.check.taken(self.function.file, node):
            self._refuse(node)
        return old or (held and self.check.moves(self.function.file, node))

    def _bind(self, target: ast.expr, value: ast.expr, held: bool, node: ast.stmt) -> None:
        if isinstance(target, ast.Name):
            (self.names.add if held else self.names.discard)(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            values: Sequence[ast.expr | None] = [None] * len(target.elts)
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                values = value.elts
            for part, own in zip(target.elts, values, strict=True):
                mine = held if own is None else self._holds(own)
                self._bind(part, own or value, mine, node)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value, held, node)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and held:
            self.names.add(target.value.id)
        elif held:
            raise Untaken(f"{self._at(node)} keeps it as {ast.unparse(target)}")

    # -- expressions --------------------------------------------------------------------------

    def _value(self, node: ast.expr, statement: ast.stmt) -> bool:
        """Return whether an expression may hold the value; refuse what no call took."""
        self._check_calls(node, statement)
        self._of_calls = []
        held = self._evaluate(node, statement)
        span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if self.chain and self.chain[0].number in span:
            if len(self.chain) == 1:
                self._of_calls.append(None)
                return True
            returned, fields = self.check.inner(self.chain[1:])
            self._of_calls += [fields] * returned
            held |= returned
        return held

    def _fields(self, node: ast.expr) -> Fields:
        """Return in which fields an object holds the value; None if it may be anywhere."""
        if isinstance(node, ast.Name):
            return self._of_name.get(node.id)
        if not isinstance(node, ast.Call):
            return None
        path = _path(node.func)
        if len(path) == 1 and path[0][:1].isupper() and not any(map(self._holds, node.args)):
            held = {k.arg for k in node.keywords if self._holds(k.value)}
            return None if None in held else frozenset(str(key) for key in held)
        return _joined(self._of_calls) if self._of_calls else None

    def _holds(self, node: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self.names for n in ast.walk(node))

    def _check_calls(self, node: ast.expr, statement: ast.stmt) -> None:
        """Refuse a call of a reader on a line that no call took."""
        if self.check.taken(self.function.file, statement):
            return
        for part in ast.walk(node):
            path = _path(part.func) if isinstance(part, ast.Call) else []
            if len(path) > 1 and path[0] == self.function.first and path[1] in self.readers:
                if self.modules and lacks(self.modules, path[1]):
                    continue
                raise Untaken(f"{self._at(statement)} calls {'.'.join(path[1:])}; no call took it")

    def _evaluate(self, node: ast.expr, statement: ast.stmt) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Attribute):
            name = node.value.id if isinstance(node.value, ast.Name) else ""
            fields = self._of_name.get(name)
            if name in self.names and fields is not None and node.attr not in fields:
                return False
            return node.attr not in _FORM and self._evaluate(node.value, statement)
        if isinstance(node, ast.Call):
            return self._call(node, statement)
        if isinstance(node, ast.IfExp):
            return self._if_expression(node, statement)
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare):
            return self._operation(node, statement)
        if isinstance(node, ast.Subscript):
            self._evaluate(node.slice, statement)
            held = self._evaluate(node.value, statement)
            if held and isinstance(node.slice, ast.Tuple | ast.Slice):
                self._need_taken(node, statement)
            return held
        if isinstance(node, ast.NamedExpr):
            held = self._evaluate(node.value, statement)
            self._bind(node.target, node.value, held, statement)
            return held
        if isinstance(node, ast.Lambda):
            if self._holds(node.body):
                raise Untaken(f"{self._at(statement)} keeps it in a function")
            return False
        parts = [self._evaluate(n, statement) for n in _children(node)]
        return any(parts)

    def _if_expression(self, node: ast.IfExp, statement: ast.stmt) -> bool:
        known = decided(node.test, self.modules, self.function.first) if self.modules else None
        arms = [node.body] if known is True else [node.orelse] if known is False else []
        if not arms:
            arms = [node.body, node.orelse]
            for arm in arms:
                if not isinstance(arm, ast.Name | ast.Constant) and self._computes(arm):
                    raise Untaken(f"{self._at(statement)} reads it in one of two ways")
        self._evaluate(node.test, statement)
        held = [self._evaluate(arm, statement) for arm in arms]
        return any(held)

    def _computes(self, node: ast.expr) -> bool:
        """Return whether an expression computes with the value."""
        parts = (n for n in ast.walk(node) if isinstance(n, ast.Call | ast.BinOp | ast.Subscript))
        return any(self._holds(part) for part in parts if isinstance(part, ast.expr))

    def _operation(self, node: ast.BinOp | ast.UnaryOp | ast.Compare, statement: ast.stmt) -> bool:
        parts = [self._evaluate(n, statement) for n in _children(node)]
        if not any(parts):
            return False
        if isinstance(node, ast.BinOp) and any(
            isinstance(n, ast.Tuple | ast.List) for n in (node.left, node.right)
        ):
            return True  # a list of outputs grows
        if isinstance(node, ast.Compare) and all(
            isinstance(op, ast.Is | ast.IsNot) for op in node.ops
        ):
            return False
        self._need_taken(node, statement)
        return self.check.moves(self.function.file, statement)

    def _call(self, node: ast.Call, statement: ast.stmt) -> bool:
        given = [self._evaluate(n, statement) for n in node.args]
        named = {k.arg: self._evaluate(k.value, statement) for k in node.keywords}
        path = _path(node.func)
        receiver = (
            self._evaluate(node.func.value, statement)
            if isinstance(node.func, ast.Attribute)
            else False
        )
        if not (receiver or any(given) or any(named.values())):
            return False
        name = path[-1] if path else getattr(node.func, "attr", "")
        if (len(path) == 1 and name in _HARMLESS) or (path[:1] and path[0] in _TALKS):
            return False
        if receiver and name in _FORM:
            return False
        if name in _KEEPS and isinstance(node.func, ast.Attribute):
            self._bind(node.func.value, node.func.value, True, statement)
            return False
        if len(path) == 1 and name[:1].isupper():
            return True  # an object that carries outputs
        if not self._need_taken(node, statement):
            return False
        if self.check.absorbs(self.function, statement, path or [name]):
            return False
        inner = [f for f in self.check.callees(self.function.file, statement) if _fits(f, name)]
        if not inner:
            return self.check.moves(self.function.file, statement) or not self._made(statement)
        read = [self.check.read(f, _bound(f, node, given, named)) for f in inner]
        self._of_calls += [fields for returned, fields in read if returned]
        return any(returned for returned, _ in read)

    def _made(self, statement: ast.stmt) -> bool:
        return self.check.taken(self.function.file, statement)

    def _need_taken(self, node: ast.expr, statement: ast.stmt) -> bool:
        """Refuse an expression that no call took; return False where none can."""
        if self.check.taken(self.function.file, statement):
            return True
        path = _path(node.func) if isinstance(node, ast.Call) else []
        first = self.function.first
        if len(path) > 1 and path[0] == first and lacks(self.modules, path[1]):
            return False
        self._refuse(statement)
        return False

    def _refuse(self, statement: ast.stmt) -> None:
        text = ast.unparse(statement).splitlines()[0]
        raise Untaken(f"{self._at(statement)} may read it, and no call took it: {text[:80]}")

    def _at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.function.file.rpartition('/')[2]}:{node.lineno}"


def _children(node: ast.AST) -> list[ast.expr]:
    found: list[ast.expr] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            found.append(child)
        elif isinstance(child, ast.comprehension):
            found += [child.iter, *child.ifs]
        elif isinstance(child, ast.keyword):
            found.append(child.value)
    return found


def _path(node: ast.AST) -> list[str]:
    """Return ["self", "block", "conv"] for `self.block.conv`, [] for anything but names."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (path := _path(node.value)):
        return [*path, node.attr]
    return []


def _fits(function: Function, name: str) -> bool:
    """Return whether a call by that name may have run the function."""
    return function.node.name in (name, "forward", "__call__")


def _bound(
    function: Function,
    call: ast.Call,
    given: Sequence[bool],
    named: dict[str | None, bool],
) -> frozenset[str]:
    """Return the parameters of a function that get the value in a call."""
    args = function.node.args
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    skip = 1 if positional[:1] == ["self"] else 0
    found: set[str] = set()
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    if starred and any(given):
        found.update(positional[skip:])
    for name, held in zip(positional[skip:], given, strict=False):
        if held:
            found.add(name)
    for key, held in named.items():
        if held and key is None:
            found.update(function.parameters[skip:])
        elif held and key is not None:
            found.add(
                key if key in function.parameters else (args.kwarg.arg if args.kwarg else key)
            )
    return frozenset(found)
