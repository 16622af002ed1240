"""Which expressions of a function may hold a value, and which of them read it.

    (h, y)    holds it        h.shape           is not the value        h[:, -1]    still is
    f(h)      what f says     self.q_proj(h)    no longer is            h * 2       reads it

On a line that no call took an expression may hand the value on; if it computes, it is refused.
"""

from __future__ import annotations

import ast

from rewrite.observe.code import fields as words
from rewrite.observe.code.fields import ANYWHERE, FORM, Untaken, excludes
from rewrite.observe.code.names import FunctionNames
from rewrite.observe.code.syntax import (
    Fixed,
    Function,
    bound,
    children,
    fits,
    functions_named,
    given_expressions,
    has_call,
    lacks,
    left_at_default,
    methods_reach,
    path_of,
    selects_rows,
)


class ExpressionReader(FunctionNames):
    """Reads expressions of one function, given the names that hold the value."""

    def value(self, node: ast.expr, statement: ast.stmt) -> bool:
        """Return whether an expression may hold the value; refuse what no call took."""
        self._check_calls(node, statement)
        self.of_calls = []
        span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        reaches = bool(self.chain) and self.chain[0].number in span
        self.reaching = self._reaching_call(node) if reaches else None
        held = self._evaluate(node, statement)
        if reaches and self.reaching is None and not self._given_to_layers(node):
            held |= self._reached()
        return held

    def _given_to_layers(self, node: ast.expr) -> bool:
        """Return whether every call in an expression is a layer that reads, or is given to one."""
        if isinstance(node, ast.Call):
            return self.check.is_layer(self.function, path_of(node.func))
        calls = [self._given_to_layers(part) for part in children(node) if has_call(part)]
        return bool(calls) and all(calls)

    def _reaching_call(self, node: ast.expr) -> ast.Call | None:
        """Return the call in an expression by which the norm is reached, if it is known."""
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
        found = [c for c in calls if self.check.reaches(self.function, path_of(c.func), self.chain)]
        return found[0] if len(found) == 1 else None

    def _reached(self) -> bool:
        """Return whether what the norm is called by returns its value."""
        if len(self.chain) == 1:
            return self._whole()
        returned, fields = self.check.inner(self.chain[1:], self._known_where_it_is_reached)
        self.of_calls += [fields] * returned
        return returned

    def _check_calls(self, node: ast.expr, statement: ast.stmt) -> None:
        """Refuse a call of a reader on a line that no call took."""
        if self.taken(statement):
            return
        for part in ast.walk(node):
            path = path_of(part.func) if isinstance(part, ast.Call) else []
            if len(path) > 1 and path[0] == self.function.first and path[1] in self.readers:
                if self.modules and lacks(self.modules, path[1]):
                    continue
                raise Untaken(f"{self.at(statement)} calls {'.'.join(path[1:])}; no call took it")
            if path[:1] == [self.function.first] and len(path) == 2:
                for reached in self.readers & methods_reach(self.modules, path[1]):
                    raise Untaken(
                        f"{self.at(statement)} calls {path[1]}, which calls {reached}; "
                        "no call took it"
                    )

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
            self.bind(node.target, node.value, held, statement)
            return held
        if isinstance(node, ast.Lambda):
            if self.holds(node.body):
                raise Untaken(f"{self.at(statement)} keeps it in a function")
            return False
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for generator in node.generators:
                held = self._evaluate(generator.iter, statement)
                self.bind(generator.target, None, held, statement)
        parts = [self._evaluate(n, statement) for n in children(node)]
        return any(parts)

    def _if_expression(self, node: ast.IfExp, statement: ast.stmt) -> bool:
        known = self.decided(node.test)
        arms = [node.body] if known is True else [node.orelse] if known is False else []
        if not arms:
            arms = [node.body, node.orelse]
            for arm in arms:
                if not isinstance(arm, ast.Name | ast.Constant) and self.computes(arm):
                    raise Untaken(f"{self.at(statement)} reads it in one of two ways")
        self._evaluate(node.test, statement)
        held = [self._evaluate(arm, statement) for arm in arms]
        return any(held)

    def _known_where_it_is_reached(self, function: Function) -> Fixed:
        """Return the parameters of the function that the norm is reached in, as far as known."""
        call = self.reaching
        name = "" if call is None else getattr(call.func, "attr", getattr(call.func, "id", ""))
        fitting = call is not None and fits(function, name)
        return self._known_arguments(function, call) if fitting and call else frozenset()

    def _known_arguments(self, function: Function, call: ast.Call) -> Fixed:
        """Return the parameters of a function whose values are known in a call of it."""
        values = {n: self.known_value(e) for n, e in given_expressions(function, call).items()}
        return left_at_default(function, call) | {
            (n, value[0]) for n, value in values.items() if value
        }

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
            return self._reached()
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
            self.bind(node.func.value, node.func.value, True, statement)
            return False
        if len(path) == 1 and (name[:1].isupper() or name in words.COLLECTS):
            return self._whole()  # an object that carries outputs
        untaken = not self.taken(statement)
        if untaken and selects_rows(node, self.check.rank_of(self.function)):
            return self._whole()
        inner = functions_named(self.function, name) if untaken and len(path) == 1 else []
        if not inner and not self._need_taken(node, statement):
            return False
        if self.check.absorbs(self.function, statement, path or [name]):
            return False
        inner = inner or [
            f for f in self.check.callees(self.function.file, statement) if fits(f, name)
        ]
        if not inner:
            moves = self.check.moves(self.function.file, statement) or not self.taken(statement)
            return moves and self._whole()
        read = [
            self.check.read(f, bound(f, node, given, named), (), self._known_arguments(f, node))
            for f in inner
        ]
        self.of_calls += [fields for returned, fields in read if returned]
        return any(returned for returned, _ in read)

    def _whole(self) -> bool:
        """Note that what a call returns may be the value itself."""
        self.of_calls.append(None)
        return True

    def _need_taken(self, node: ast.expr, statement: ast.stmt) -> bool:
        """Refuse an expression that no call took; return False where none can."""
        if self.taken(statement):
            return True
        path = path_of(node.func) if isinstance(node, ast.Call) else []
        first = self.function.first
        if len(path) > 1 and path[0] == first and lacks(self.modules, path[1]):
            return False
        self.refuse(statement)
        return False
