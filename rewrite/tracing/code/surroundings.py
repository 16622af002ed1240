"""The syntactic context of an expression, which may make it harmless to a rewrite.

for m in self.modules(): if isinstance(m, nn.Conv2d): …      inspects modules of one class alone
raise ValueError(f"{self.norm} …")                           only builds a message
next(self.parameters()).device                               reads no values
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from rewrite.tracing.code.module_paths import called, classes_of

_KINDS = frozenset({"dtype", "device", "is_cuda"})

_SAYS = frozenset(
    {"print", "warn", "debug", "info", "warning", "warning_once", "error", "critical"}
)


class Surroundings:
    """The syntax around each node of a tree.

    Args:
        tree: the source of a function.
        scope: the globals of its module, by which names of classes are found.

    Attributes:
        parents: the parent of each node.
    """

    def __init__(self, tree: ast.AST, scope: Mapping[str, Any]) -> None:
        self._scope = scope
        self.parents: dict[ast.AST, ast.AST] = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }

    def asks_classes(self, node: ast.AST) -> bool:
        """Return whether a loop over modules selects by name, or inspects one class alone."""
        holder = self.parents.get(node)
        if called(holder or node) == "dict":
            return True
        if not isinstance(holder, ast.For | ast.comprehension):
            return False
        names = {part.id for part in ast.walk(holder.target) if isinstance(part, ast.Name)}
        whole = holder if isinstance(holder, ast.For) else self.parents[holder]
        asked: set[ast.AST] = set()
        for part in ast.walk(whole):
            if isinstance(part, ast.If | ast.IfExp) and self._is_of_class(part.test):
                asked |= {part.test, *(part.body if isinstance(part, ast.If) else [part.body])}
            elif isinstance(part, ast.comprehension) and any(map(self._is_of_class, part.ifs)):
                asked |= {whole}
            elif self._is_of_class(part):
                asked |= {part}
        inside = {below for part in asked for below in ast.walk(part)}
        return all(
            use in inside
            for use in ast.walk(whole)
            if isinstance(use, ast.Name) and use.id in names and isinstance(use.ctx, ast.Load)
        )

    def is_said(self, node: ast.AST) -> bool:
        """Return whether a string is only the message of an error, an assertion or a log."""
        parent: ast.AST | None = node
        while parent is not None and not isinstance(parent, ast.stmt):
            if called(parent) in _SAYS:
                return True
            parent = self.parents.get(parent)
        return isinstance(parent, ast.Raise | ast.Assert)

    def asks_kind(self, node: ast.Call) -> bool:
        """Return whether a line reads no more of a parameter than its dtype or device."""
        holder = self.parents.get(node)
        if isinstance(holder, ast.comprehension) and isinstance(holder.target, ast.Name):
            return self._asks_kind_of_each(holder)
        parent: ast.AST = node
        for _ in range(3):
            parent = self.parents.get(parent, node)
            if isinstance(parent, ast.Attribute) and parent.attr in _KINDS:
                return True
        return False

    def _asks_kind_of_each(self, holder: ast.comprehension) -> bool:
        """Return whether `p.dtype for p in self.parameters()` reads no more of each."""
        name = holder.target.id if isinstance(holder.target, ast.Name) else ""
        whole = self.parents[holder]
        uses = [
            self.parents[part]
            for part in ast.walk(whole)
            if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load)
        ]
        return bool(uses) and all(
            isinstance(use, ast.Attribute) and use.attr in (*_KINDS, "is_floating_point")
            for use in uses
        )

    def _is_of_class(self, test: ast.AST) -> bool:
        """Return whether a condition is `isinstance(name, K)`, where K can be resolved."""
        if not isinstance(test, ast.Call) or called(test) != "isinstance" or len(test.args) < 2:
            return False
        return bool(classes_of(test.args[1], self._scope))
