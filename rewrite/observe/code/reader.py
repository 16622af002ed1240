"""One function, read statement by statement: which of its names may hold a value, and who reads it.

    h = self.norm(x)      h holds it          h = self.q_proj(h)     h no longer does
    if self.pre_norm:     decided by the model: only one branch is read
    if mask is None:      not decided: both are read, and both lead on

Expressions are read by `rewrite.observe.code.expressions`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from rewrite.observe.code.expressions import ExpressionReader
from rewrite.observe.code.fields import ANYWHERE, Fields, Untaken, joined, merged
from rewrite.observe.code.names import Surroundings
from rewrite.observe.code.syntax import Fixed, Function, path_of
from rewrite.observe.export import CodeLine


class FunctionReader(ExpressionReader):
    """Reads one function.

    Attributes:
        returns: whether it may return the value.
        fields: in which fields of what it returns.
    """

    def __init__(
        self,
        check: Surroundings,
        function: Function,
        names: set[str],
        chain: tuple[CodeLine, ...],
        fixed: Fixed = frozenset(),
    ) -> None:
        super().__init__(check, function, names, chain)
        self.known = dict(fixed)
        self.returns = False
        self.fields: Fields = frozenset()

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Read statements in their order; return whether the last of them is never passed."""
        for statement in statements:
            if isinstance(statement, ast.If):
                if self._if(statement):
                    return True
                continue
            if self._cannot_run(statement):
                return True
            self._statement(statement)
            if isinstance(statement, ast.Return | ast.Raise | ast.Continue | ast.Break):
                return True
        return False

    def _cannot_run(self, node: ast.stmt) -> bool:
        """Return whether a statement asks for a part of what is None in every module here."""
        if not self.modules or self.taken(node):
            return False
        for part in ast.walk(node):
            path = path_of(part) if isinstance(part, ast.Attribute) else []
            if len(path) > 2 and path[0] == self.function.first:
                held = [getattr(module, path[1], self) for module in self.modules]
                if all(item is None for item in held):
                    return True
        return False

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
            self._compound(node)
        elif isinstance(node, ast.Return):
            if node.value is not None and self.value(node.value, node):
                self.returns = True
                self.fields = joined([self.fields, self.fields_of(node.value)])
        elif isinstance(node, ast.Assign):
            held = self.value(node.value, node)
            known = self.known_value(node.value)
            for target in node.targets:
                self.bind(target, node.value, held, node)
                if isinstance(target, ast.Name):
                    self.known.update((target.id, value) for value in known)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
            held = self.value(node.value, node)
            if isinstance(node, ast.AugAssign):
                grows = self.is_collection(node.target) or self.is_collection(node.value)
                held = self._augmented(node, held)
                self.bind(node.target, None, held, node)
                if grows and isinstance(node.target, ast.Name):
                    self.of_name[node.target.id] = frozenset({ANYWHERE})
            else:
                self.bind(node.target, node.value, held, node)
        elif isinstance(node, ast.Expr):
            self.value(node.value, node)
        elif isinstance(node, ast.FunctionDef):
            if self.holds(node):
                raise Untaken(f"{self.at(node)} keeps it in a function")
        elif isinstance(node, ast.Delete):
            self.names -= {t.id for t in node.targets if isinstance(t, ast.Name)}

    def _if(self, node: ast.If) -> bool:
        """Read both branches, or the one that the model has decided on; is neither ever left?"""
        self.value(node.test, node)
        known = self.decided(node.test)
        before, fields, constants = set(self.names), dict(self.of_name), dict(self.known)
        after: list[tuple[set[str], dict[str, Fields]]] = []
        left: list[dict[str, Any]] = []
        for wanted, body in ((True, node.body), (False, node.orelse)):
            if known is not None and known is not wanted:
                continue
            self.names, self.of_name, self.known = set(before), dict(fields), dict(constants)
            if not self.block(body):
                after.append((self.names, self.of_name))
                left.append(self.known)
        self.of_name = merged(after)
        self.names = set().union(*(names for names, _ in after))
        self.known = {
            name: value
            for name, value in (left[0] if left else constants).items()
            if all(name in other and other[name] == value for other in left)
        }
        return not after

    def _compound(self, node: ast.For | ast.While | ast.With | ast.Try) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
                self.known.pop(part.id, None)
        if isinstance(node, ast.For):
            held = self.value(node.iter, node)
            self.bind(node.target, None, held, node)
        elif isinstance(node, ast.While):
            self.value(node.test, node)
        bodies = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
        bodies += [handler.body for handler in getattr(node, "handlers", [])]
        for _ in range(2 if isinstance(node, ast.For | ast.While) else 1):
            before, fields = set(self.names), dict(self.of_name)
            for body in bodies:
                self.block(body)
            self.of_name = merged([(before, fields), (self.names, self.of_name)])
            if isinstance(node, ast.For | ast.While):
                self.names |= before

    def _augmented(self, node: ast.AugAssign, held: bool) -> bool:
        old = isinstance(node.target, ast.Name) and node.target.id in self.names
        if (held or old) and (self.is_collection(node.value) or self.is_collection(node.target)):
            return True  # a list of outputs
        if (held or old) and not self.taken(node):
            self.refuse(node)
        return old or (held and self.check.moves(self.function.file, node))
