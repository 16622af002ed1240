"""Which expressions of a function may hold a value, and which of them read it.

    (h, y)    holds it        h.shape           is not the value        h[:, -1]    still is
    f(h)      what f says     self.q_proj(h)    no longer is            h * 2       reads it

On a line that no call took an expression may hand the value on; if it computes, it is refused.
"""

from __future__ import annotations

import ast

from rewrite.observe.code import fields as words
from rewrite.observe.code.calls import CallReader
from rewrite.observe.code.fields import ANYWHERE, FORM, UnobservedLine, excludes
from rewrite.observe.code.rows import selects_rows
from rewrite.observe.code.state import behind
from rewrite.observe.code.syntax import (
    children,
    fits,
    functions_named,
)
from rewrite.tracing.taint import path_of


class ExpressionReader(CallReader):
    """Reads expressions of one function, given the names that hold the value."""

    def value(self, node: ast.expr, statement: ast.stmt) -> bool:
        """Return whether an expression may hold the value; refuse what no call took."""
        self._check_calls(node, statement)
        self.of_calls = []
        self.returned, self.parts = {}, {}
        span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        reaches = bool(self.chain) and self.chain[0].number in span
        self.reaching = self._reaching_call(node) if reaches else None
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
        self.only_call = calls[0] if len(calls) == 1 else None
        held = self._evaluate(node, statement)
        if reaches and self.reaching is None and not self._given_to_layers(node):
            held |= self._reached(node)
        return held

    def _evaluate(self, node: ast.expr, statement: ast.stmt) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Attribute):
            name = node.value.id if isinstance(node.value, ast.Name) else ""
            fields = self.of_name.get(name)
            if name in self.names and excludes(fields, node.attr):
                return False
            return node.attr not in FORM and self._evaluate(node.value, statement)
        if isinstance(node, ast.Call):
            return self._call(node, statement)
        if isinstance(node, ast.IfExp):
            return self._if_expression(node, statement)
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare):
            return self._operation(node, statement)
        if isinstance(node, ast.BoolOp):
            return self._bool_operation(node, statement)
        if isinstance(node, ast.Subscript):
            self._evaluate(node.slice, statement)
            held = self._evaluate(node.value, statement)
            if held and self.is_collection(node.value):
                fields = self.of_name[node.value.id] if isinstance(node.value, ast.Name) else None
                place = node.slice.value if isinstance(node.slice, ast.Constant) else ANYWHERE
                return not excludes(fields, str(place))
            moves = isinstance(node.slice, ast.Tuple | ast.Slice)
            if held and moves and not selects_rows(node, self.check.rank_of(self.function)):
                self._need_taken(node, statement)
            return held
        if isinstance(node, ast.NamedExpr):
            held = self._evaluate(node.value, statement)
            self.bind(node.target, node.value, held, statement, self.other(node.value, statement))
            return held
        if isinstance(node, ast.Lambda):
            if self.holds(node.body):
                raise UnobservedLine(f"{self.at(statement)} keeps it in a function")
            return False
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for generator in node.generators:
                held = self._evaluate(generator.iter, statement)
                self.bind(generator.target, None, held, statement)
        parts = {part: self._evaluate(part, statement) for part in children(node)}
        self.parts |= parts
        return any(parts.values())

    def _bool_operation(self, node: ast.BoolOp, statement: ast.stmt) -> bool:
        """Read the parts of `and` and `or`: what follows the first may not be evaluated."""
        held = [self._evaluate(node.values[0], statement)]
        before = self.copy()
        held += [self._evaluate(part, statement) for part in node.values[1:]]
        self.enter(behind([before, self.copy()]))
        return any(held)

    def _if_expression(self, node: ast.IfExp, statement: ast.stmt) -> bool:
        known = self.decided(node.test)
        arms = [node.body] if known is True else [node.orelse] if known is False else []
        if not arms:
            arms = [node.body, node.orelse]
            for arm in arms:
                if not isinstance(arm, ast.Name | ast.Constant) and self.computes(arm):
                    raise UnobservedLine(f"{self.at(statement)} reads it in one of two ways")
        self._evaluate(node.test, statement)
        held = [self._evaluate(arm, statement) for arm in arms]
        return any(held)

    def _operation(self, node: ast.BinOp | ast.UnaryOp | ast.Compare, statement: ast.stmt) -> bool:
        parts = [self._evaluate(n, statement) for n in children(node)]
        if not any(parts):
            return False
        if isinstance(node, ast.BinOp) and self.adds_collections(node):
            return True  # a list of outputs grows
        if isinstance(node, ast.Compare) and all(
            isinstance(op, ast.Is | ast.IsNot) for op in node.ops
        ):
            return False
        for part, held in zip(children(node), parts, strict=True):
            if held:
                self.check_alone(part, statement)
        self._need_taken(node, statement)
        return self.check.moves(self.function.file, statement)

    def _call(self, node: ast.Call, statement: ast.stmt) -> bool:
        given = [self._evaluate(n, statement) for n in node.args]
        named: dict[str | None, bool] = {}
        for keyword in node.keywords:
            held = self._evaluate(keyword.value, statement)
            fields = self.fields_of(keyword.value) if held and keyword.arg is None else None
            named |= words.spread(fields) or {keyword.arg: held}
        if node is self.reaching:
            return self._reached(node)
        path = path_of(node.func)
        func = node.func
        receiver = isinstance(func, ast.Attribute) and self._evaluate(func.value, statement)
        if not (receiver or any(given) or any(named.values())):
            return False
        name = path[-1] if path else getattr(node.func, "attr", "")
        if (len(path) == 1 and name in words.HARMLESS) or (path[:1] and path[0] in words.TALKS):
            return False
        if receiver and name in FORM:
            return False
        if name in words.KEEPS and isinstance(node.func, ast.Attribute):
            self._kept(node.func.value, name, node, statement)
            return False
        if len(path) == 1 and (name[:1].isupper() or name in words.COLLECTS):
            self.of_calls.append(None)  # an object that carries outputs
            return True
        untaken = not self.taken(statement)
        if untaken and selects_rows(node, self.check.rank_of(self.function)):
            self._check_given(node, given, receiver, statement)
            return self._whole(node)
        inner = functions_named(self.function, name) if untaken and len(path) == 1 else []
        if not inner and not self._need_taken(node, statement):
            return False
        if self.check.absorbs(self.function, statement, path or [name]):
            self._check_given(node, given, receiver, statement)
            return False
        inner = inner or [
            f for f in self.check.callees(self.function.file, statement) if fits(f, name)
        ]
        if not inner:
            moves = self.check.moves(self.function.file, statement) or not self.taken(statement)
            if moves or self.check.reads_on(self.function.file, statement):
                self._check_given(node, given, receiver, statement)
            return moves and self._whole(node)
        return self._read(inner, node, given, named)
