"""One function, read statement by statement: which of its names may hold a value, and who reads it.

    h = self.norm(x)      h holds it          h = self.q_proj(h)     h no longer does
    if self.pre_norm:     decided by the model: only one branch is read
    if mask is None:      not decided: both are read, and both lead on

Expressions are read by `rewrite.observe.code.expressions`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from rewrite.observe.code.fields import ANYWHERE, Fields, UnobservedLine, joined
from rewrite.observe.code.forks import ForkReader
from rewrite.observe.code.names import CodeContext, Others
from rewrite.observe.code.state import NotNone, Other, either
from rewrite.observe.code.syntax import Fixed, Function
from rewrite.observe.export import CodeLine
from rewrite.tracing.taint import path_of

_LEAVES = ast.Return | ast.Raise | ast.Continue | ast.Break


class FunctionReader(ForkReader):
    """Reads one function.

    Attributes:
        returns: whether it may return the value.
        fields: in which fields of what it returns.
        instead: another value that it may return instead.
    """

    def __init__(
        self,
        check: CodeContext,
        function: Function,
        names: set[str],
        chain: tuple[CodeLine, ...],
        fixed: Fixed = frozenset(),
        others: Others = frozenset(),
    ) -> None:
        super().__init__(check, function, names, chain)
        self.known = dict(fixed)
        self.others = dict(others)
        for name in names:
            other = self.others.get(name)
            if other is None or (other.given and not other.nothing):
                self.known[name] = NotNone()
        self.returns = False
        self.fields: Fields = frozenset()
        self.instead: Other | None = None
        self.left = []

    def block(self, statements: Sequence[ast.stmt]) -> bool:
        """Read statements in their order; return whether the last of them is never passed."""
        for statement in statements:
            if not isinstance(statement, ast.If) and self._cannot_run(statement):
                return True
            if self._statement(statement) or isinstance(statement, _LEAVES):
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

    def _statement(self, node: ast.stmt) -> bool:
        """Read a statement; return whether no way through it goes on."""
        if isinstance(node, ast.If):
            return self.fork(node)
        if isinstance(node, ast.For | ast.While):
            return self.loop(node)
        if isinstance(node, ast.With):
            return self.context(node)
        if isinstance(node, ast.Try):
            return self.attempt(node)
        if isinstance(node, ast.Match):
            return self.match(node)
        if isinstance(node, ast.Break | ast.Continue):
            self.left[-1].append(self.copy())
        elif isinstance(node, ast.Return):
            self._return(node)
        elif isinstance(node, ast.Assign):
            held = self.value(node.value, node)
            known, other = self.known_value(node.value), self.other(node.value, node)
            for target in node.targets:
                self.bind(target, node.value, held, node, other)
                if isinstance(target, ast.Name):
                    self.known.update((target.id, value) for value in known)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            held = self.value(node.value, node)
            self.bind(node.target, node.value, held, node, self.other(node.value, node))
        elif isinstance(node, ast.AugAssign):
            self._augmented(node)
        elif isinstance(node, ast.Expr):
            self.value(node.value, node)
        elif isinstance(node, ast.Delete):
            self.names -= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif not isinstance(node, ast.Assert | ast.Raise) and self.holds(node):
            raise UnobservedLine(f"{self.at(node)} keeps it in a function")
        return False

    def _return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        held = self.value(node.value, node)
        if held:
            self.returns = True
            self.fields = joined([self.fields, self.fields_of(node.value)])
        other = self.other(node.value, node)
        collects = isinstance(node.value, ast.Tuple | ast.List | ast.Dict)
        if other is None and not held and collects and not self.taken(node):
            other = Other(self.at(node))
        self.instead = either(self.instead, other)

    def _augmented(self, node: ast.AugAssign) -> None:
        held = self.value(node.value, node)
        grows = self.is_collection(node.target) or self.is_collection(node.value)
        old = isinstance(node.target, ast.Name) and node.target.id in self.names
        if (held or old) and grows:
            held = True  # a list of outputs
        elif held or old:
            if not self.taken(node):
                self.refuse(node)
            self.check_alone(node.value if held else node.target, node)
            held = old or self.check.moves(self.function.file, node)
        shown = held or (self.taken(node) and self.check.moves(self.function.file, node))
        self.bind(node.target, None, held, node, None if shown else Other(self.at(node)))
        if grows and isinstance(node.target, ast.Name):
            self.of_name[node.target.id] = frozenset({ANYWHERE})
