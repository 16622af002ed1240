"""Statements with bodies: which of them may run, and what is known behind them.

if flag: h = y        both ways are read, unless the model has decided
for b in blocks:      the body is read twice: what it leaves is there when it begins again
try: ... except:      a handler begins anywhere in the body
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace

from rewrite.observe.code.expressions import ExpressionReader
from rewrite.observe.code.state import Other, State, behind


class ForkReader(ExpressionReader):
    """Reads the statements of one function that have bodies.

    Attributes:
        left: per loop around the line, what is known where it is left or begun anew.
    """

    left: list[list[State]]

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Read statements in their order; return whether the last of them is never passed."""
        raise NotImplementedError

    def fork(self, node: ast.If) -> bool:
        """Read both branches, or the one that the model has decided on; is neither ever left?"""
        self.value(node.test, node)
        known = self.decided(node.test)
        before = self.copy()
        after: list[State] = []
        for wanted, body in ((True, node.body), (False, node.orelse)):
            if known is not None and known is not wanted:
                continue
            self.enter(before)
            self._narrow(node.test, wanted)
            if not self.block(body):
                after.append(self.copy())
        self.enter(behind(after))
        return not after

    def _narrow(self, test: ast.expr, wanted: bool) -> None:
        """Note behind `if x is None` that x is not None where the test failed."""
        if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Name):
            return
        none = isinstance(right := test.comparators[0], ast.Constant) and right.value is None
        fails = isinstance(test.ops[0], ast.IsNot if wanted else ast.Is)
        other = self.others.get(test.left.id)
        if none and fails and other is not None and other.nothing:
            if other.given:
                self.others[test.left.id] = replace(other, nothing=False)
            else:
                del self.others[test.left.id]

    def context(self, node: ast.With) -> bool:
        """Read the body of a `with`; is it never left?"""
        for item in node.items:
            held = self.value(item.context_expr, node)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, None, held, node, Other(self.at(node)))
        return self.block(node.body)

    def loop(self, node: ast.For | ast.While) -> bool:
        """Read the body of a loop twice: what it leaves is there when it begins again."""
        self._forget(node)
        surely = isinstance(node, ast.For) and self._runs(node)
        for _ in range(2):
            if isinstance(node, ast.For):
                held = self.value(node.iter, node)
            else:
                self.value(node.test, node)
            before = self.copy()
            if isinstance(node, ast.For):
                self.bind(node.target, None, held, node, None if held else Other(self.at(node)))
            self.left.append([])
            ended = self.block(node.body)
            after = self.left.pop() + ([] if ended else [self.copy()])
            self.enter(behind(after if surely and after else [before, *after]))
        return self.block(node.orelse)

    def _runs(self, node: ast.For) -> bool:
        """Return whether a loop over what the model holds runs: it ran in some call."""
        named = {n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)}
        words = {"enumerate", "zip", "range", "len", "reversed", "list", "tuple"}
        took = any(
            self.taken(n) for n in ast.walk(node) if isinstance(n, ast.stmt) and n is not node
        )
        return self.function.first in named and named <= {self.function.first, *words} and took

    def attempt(self, node: ast.Try) -> bool:
        """Read the body of a `try`, and each handler as if it began anywhere in it."""
        self._forget(node)
        before = self.copy()
        ended = self.block(node.body)
        after = [] if ended else [self.copy()]
        somewhere = behind([before, self.copy()])
        if after and self.block(node.orelse):
            after = []
        elif after:
            after = [self.copy()]
        for handler in node.handlers:
            self.enter(somewhere)
            if not self.block(handler.body):
                after.append(self.copy())
        self.enter(behind(after or [somewhere]))
        return self.block(node.finalbody) or not after

    def match(self, node: ast.Match) -> bool:
        """Read each case of a `match`, of which none may fit."""
        held = self.value(node.subject, node)
        before = self.copy()
        after = [before]
        for case in node.cases:
            self.enter(before)
            for part in ast.walk(case.pattern):
                for name in (getattr(part, "name", None), getattr(part, "rest", None)):
                    if name is not None:
                        self.bind(ast.Name(name, ast.Store()), None, held, node)
            if case.guard is not None:
                self.value(case.guard, node)
            if not self.block(case.body):
                after.append(self.copy())
        self.enter(behind(after))
        return False

    def _forget(self, node: ast.For | ast.While | ast.Try) -> None:
        """Forget the constants of names that a statement with a body binds."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
                self.known.pop(part.id, None)
