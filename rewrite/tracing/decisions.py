"""Branches on input sizes, and the values that the branch not taken may read or replace.

    if x.shape[-1] % 2:              # an input of another size takes the other branch
        x = self.pad(x)              # it reads x, and x is another value from here on
    return self.conv(x)

A trace with example inputs takes the branches of their sizes. The code that did not run may read
any value that its function had at that point, and the function may compute something else
afterwards: those values have readers that the graph does not show. A branch that only raises, and
a size that only becomes the size of a new tensor, decide nothing.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from types import CodeType

from torch.fx import Node

from rewrite.tracing.code.source import source_of
from rewrite.tracing.rebinding import touched_by_rebinding
from rewrite.tracing.records import Decision
from rewrite.tracing.taint import path_of

_NUMBERS = frozenset({"torch", "F", "math", "np", "max", "min", "abs", "nn"})
"""What may be called with a size and returns no more than a number or a new tensor."""


def uncertain_values(decisions: Iterable[Decision]) -> dict[Node, str]:
    """Return the values that code which did not run may read, each with where and when."""
    found: dict[Node, str] = {}
    for decision in decisions:
        for node in decision.nodes:
            found.setdefault(node, f"{place_of(decision)} may read it otherwise {decision.when}")
    return found


def place_of(decision: Decision) -> str:
    """Return "file.py:123", the line of a decision."""
    return f"{decision.code.co_filename.rpartition('/')[2]}:{decision.line}"


def real_decisions(
    decisions: Iterable[Decision], lines: Mapping[Node, tuple[CodeType, int]]
) -> tuple[Decision, ...]:
    """Return the decisions after which other code may run, or other values be read.

    A decision that only rebinds local names is reduced to the values of those names.
    """
    trees: dict[CodeType, ast.Module | None] = {}
    statements: dict[tuple[CodeType, int], ast.stmt | None] = {}
    kept = []
    for decision in decisions:
        key = (decision.code, decision.line)
        if key not in statements:
            statements[key] = statement_at(*key, trees)
        statement = statements[key]
        if statement is not None and _is_harmless(statement):
            continue
        touched = touched_by_rebinding(decision, statement, trees[decision.code], lines)
        kept.append(decision if touched is None else replace(decision, nodes=touched))
    return tuple(kept)


def statement_at(
    code: CodeType, line: int, trees: dict[CodeType, ast.Module | None]
) -> ast.stmt | None:
    """Return the branching statement on a line of a function; None without its source."""
    if code not in trees:
        trees[code] = source_of(code)
    tree = trees[code]
    if tree is None:
        return None
    wanted = line - code.co_firstlineno + 1
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= wanted <= (node.end_lineno or 0)
    ]
    deciding = [node for node in found if _decides_on(node, wanted)]
    return max(deciding or found, key=lambda node: node.lineno, default=None)


@lru_cache(maxsize=4096)
def returns_an_answer(code: CodeType) -> bool:
    """Return whether a function may return a condition or number, for its caller to branch on."""
    tree = source_of(code)
    if tree is None:
        return True
    returned = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and n.value]
    returned += [n.body for n in ast.walk(tree) if isinstance(n, ast.Lambda)]
    return any(_is_answer(value) for value in returned)


def _is_answer(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return path_of(value.func) in (["bool"], ["int"], ["float"], ["len"])
    if isinstance(value, ast.IfExp):
        return _is_answer(value.body) or _is_answer(value.orelse)
    if isinstance(value, ast.Constant):
        return value.value is not None
    negates = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
    return negates or isinstance(value, ast.Compare | ast.BoolOp)


def _decides_on(node: ast.stmt, line: int) -> bool:
    part = getattr(node, "test", getattr(node, "iter", getattr(node, "subject", None)))
    return isinstance(part, ast.expr) and part.lineno <= line <= (part.end_lineno or 0)


def _is_harmless(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assert):
        return True
    if isinstance(statement, ast.If):
        return all(_only_complains(part) for part in (*statement.body, *statement.orelse))
    if not isinstance(
        statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr
    ):
        return False
    inner = list(ast.walk(statement))
    if any(isinstance(node, ast.IfExp | ast.comprehension | ast.Lambda) for node in inner):
        return False
    indexed = [node.slice for node in inner if isinstance(node, ast.Subscript)]
    if not all(isinstance(index, ast.Constant | ast.UnaryOp | ast.Slice) for index in indexed):
        return False
    calls = [path_of(node.func) or [""] for node in inner if isinstance(node, ast.Call)]
    builtin = [path[0] for path in calls if len(path) == 1 and hasattr(builtins, path[0])]
    return any(path[0] in _NUMBERS for path in calls) and _NUMBERS.issuperset(builtin)


def _only_complains(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        path = path_of(statement.value.func) or [""]
        return path[0] in ("warnings", "logger", "logging", "_logger", "print")
    return isinstance(statement, ast.Raise | ast.Pass | ast.Assert)
