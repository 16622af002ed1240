"""Calls in the code of a function: which of them reach the norm, what they are given and return.

h = self.block(x)           the norm is called in it: read where that happens
y = self.helper(h)          it is given the value: read with that parameter
out = Output(first=h)       it keeps the value
"""

from __future__ import annotations

import ast

from rewrite.observe.code.fields import ANYWHERE, UnobservedLine, excludes
from rewrite.observe.code.names import Others
from rewrite.observe.code.others import OtherValues
from rewrite.observe.code.state import either
from rewrite.observe.code.syntax import (
    Fixed,
    Function,
    bound,
    children,
    fits,
    given_expressions,
    has_call,
    lacks,
    left_at_default,
    methods_reach,
)
from rewrite.tracing.taint import path_of


class CallReader(OtherValues):
    """Reads what calls of one function are given, and what they return.

    Attributes:
        only_call: the one call of the expression that is read now, if there is but one.
    """

    only_call: ast.Call | None

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

    def _reached(self, node: ast.expr) -> bool:
        """Return whether what the norm is called by returns its value."""
        if len(self.chain) == 1:
            return self._whole(node)
        returned = self.check.inner(
            self.chain[1:], self._known_where_it_is_reached, self._others_where_it_is_reached
        )
        self.of_calls += [returned.fields] * returned.held
        if returned.held:
            self.returned[node] = returned.other
        return returned.held

    def _check_calls(self, node: ast.expr, statement: ast.stmt) -> None:
        """Refuse a call of a reader on a line that no call took."""
        if self.taken(statement):
            return
        for part in ast.walk(node):
            path = path_of(part.func) if isinstance(part, ast.Call) else []
            if len(path) > 1 and path[0] == self.function.first and path[1] in self.readers:
                if self.modules and lacks(self.modules, path[1]):
                    continue
                raise UnobservedLine(
                    f"{self.at(statement)} calls {'.'.join(path[1:])}; no call took it"
                )
            if path[:1] == [self.function.first] and len(path) == 2:
                for reached in self.readers & methods_reach(self.modules, path[1]):
                    raise UnobservedLine(
                        f"{self.at(statement)} calls {path[1]}, which calls {reached}; "
                        "no call took it"
                    )

    def _known_where_it_is_reached(self, function: Function) -> Fixed:
        """Return the parameters of the function that the norm is reached in, as far as known."""
        call = self.reaching
        name = "" if call is None else getattr(call.func, "attr", getattr(call.func, "id", ""))
        fitting = call is not None and fits(function, name)
        return self._known_arguments(function, call) if fitting and call else frozenset()

    def _others_where_it_is_reached(self, function: Function) -> Others:
        """Return the parameters of the function that the norm is reached in, if given others."""
        fixed = self._known_where_it_is_reached(function)
        return self.others_in(function, self.reaching or self.only_call, fixed)

    def _known_arguments(self, function: Function, call: ast.Call) -> Fixed:
        """Return the parameters of a function whose values are known in a call of it."""
        values = {n: self.known_value(e) for n, e in given_expressions(function, call).items()}
        return left_at_default(function, call) | {
            (n, value[0]) for n, value in values.items() if value
        }

    def _read(
        self,
        functions: list[Function],
        node: ast.Call,
        given: list[bool],
        named: dict[str | None, bool],
    ) -> bool:
        """Read the functions that a call may run; return whether one returns the value."""
        found = []
        for function in functions:
            fixed = self._known_arguments(function, node)
            others = self.others_in(function, node, fixed)
            held = bound(function, node, given, named)
            found.append(self.check.read(function, held, (), fixed, others))
        returned = [each for each in found if each.held]
        self.of_calls += [each.fields for each in returned]
        if returned:
            self.returned[node] = either(*(each.other for each in returned))
        return bool(returned)

    def _kept(self, holder: ast.expr, name: str, node: ast.Call, statement: ast.stmt) -> None:
        """Note that a collection grows by the value, or by something beside it."""
        if name in ("update", "setdefault") and not self.taken(statement):
            fields = self.of_name.get(holder.id) if isinstance(holder, ast.Name) else None
            keys = [ANYWHERE if k.arg is None else k.arg for k in node.keywords]
            keys += [ANYWHERE] * len(node.args)
            if self.mentions(holder) and not all(excludes(fields, key) for key in keys):
                self.refuse(statement)
        self.bind(holder, holder, True, statement)

    def _check_given(
        self, node: ast.Call, given: list[bool], receiver: bool, statement: ast.stmt
    ) -> None:
        """Refuse to give a call what may be the value or another one."""
        read = [part for part, held in zip(node.args, given, strict=True) if held]
        read += [k.value for k in node.keywords if self.may(k.value)]
        if receiver and isinstance(node.func, ast.Attribute):
            read.append(node.func.value)
        for part in read:
            self.check_alone(part, statement)

    def _whole(self, node: ast.expr) -> bool:
        """Note that what a call returns may be the value itself."""
        self.of_calls.append(None)
        self.returned[node] = None
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
