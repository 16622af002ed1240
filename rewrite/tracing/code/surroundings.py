"""Where a piece of syntax stands in a function, and what the code around it asks for.

for m in self.modules(): if isinstance(m, nn.Conv2d): …      looks at the modules of one class
raise ValueError(f"{self.norm} …")                           is only said to somebody
next(self.parameters()).device                               reads no values
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from rewrite.tracing.code.module_paths import called, classes_of

_KINDS = frozenset({"dtype", "device", "is_cuda"})

_SAYS = frozenset(
    {"print", "warn", "debug", "info", "warning", "warning_once", "error", "critical"}
)


def source_of(function: FunctionType) -> ast.Module | None:
    """Return the syntax of a function, its first line being line 1; None without a source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return None
    except SyntaxError:
        return _lambdas(function)


def _lambdas(function: FunctionType) -> ast.Module | None:
    """Return the lambdas with the function's arguments that begin on its line.

    A lambda may stand in the middle of a statement of several lines, which is no source by itself.
    """
    code = function.__code__
    lines, _ = inspect.findsource(function)
    names = list(code.co_varnames[: code.co_argcount])
    found: list[ast.stmt] = [
        ast.Expr(node)
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, ast.Lambda)
        and node.lineno == code.co_firstlineno
        and [argument.arg for argument in node.args.args] == names
    ]
    tree = ast.Module(found, [])
    return ast.increment_lineno(tree, 1 - code.co_firstlineno) if found else None


class Surroundings:
    """The syntax around each node of a tree.

    Args:
        tree: the source of a function.
        scope: the globals of its module, by which names of classes are found.

    Attributes:
        parents: of each node the one that holds it.
    """

    def __init__(self, tree: ast.AST, scope: Mapping[str, Any]) -> None:
        self._scope = scope
        self.parents: dict[ast.AST, ast.AST] = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }

    def asks_classes(self, node: ast.AST) -> bool:
        """Return whether a loop over modules picks by name, or looks at those of a class alone."""
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
        """Return whether a text goes into an error, an assertion or a log."""
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
        """Return whether a condition is `isinstance(name, K)`, for a class that is known."""
        if not isinstance(test, ast.Call) or called(test) != "isinstance" or len(test.args) < 2:
            return False
        return bool(classes_of(test.args[1], self._scope))
