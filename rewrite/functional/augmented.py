"""Which nodes of a trace are `x += y`: a proxy records it as `x + y`, like any other sum.

A line `x += a + b` makes two sums, and the assignment is the last: with k operators of its kind on
the line beside it, every (k + 1)-th node of that line is the one. Where the count does not come
out even, parts of the line did not run, and nobody can tell.
"""

from __future__ import annotations

import ast
import linecache
import operator
import textwrap
from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch.fx import Node

from rewrite.graph.captured import Captured

_SPELLINGS: Mapping[Any, type[ast.operator]] = {
    operator.add: ast.Add, operator.sub: ast.Sub, operator.mul: ast.Mult,
    operator.truediv: ast.Div, operator.floordiv: ast.FloorDiv, operator.mod: ast.Mod,
    operator.pow: ast.Pow, operator.matmul: ast.MatMult, operator.and_: ast.BitAnd,
    operator.or_: ast.BitOr, operator.xor: ast.BitXor,
}  # fmt: skip


class AugmentedAssignments:
    """The augmented assignments of a captured model's code."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._nodes: dict[Any, list[Node]] = {}
        for region in captured.regions:
            for node, line in region.lines.items():
                if node.target in _SPELLINGS:
                    key = (region.name, region.frames.get(node), line, node.target)
                    self._nodes.setdefault(key, []).append(node)

    def is_one(self, node: Node) -> bool | None:
        """Return whether `node` is the operation of an augmented assignment; None: unknown."""
        region = self._captured.region_of(node)
        line = region.lines.get(node)
        if node.target not in _SPELLINGS or line is None:
            return False
        statement = _statement(*line)
        kind = _SPELLINGS[node.target]
        if statement is None or not isinstance(statement.op, kind):
            return False
        beside = sum(
            isinstance(inner, ast.BinOp) and isinstance(inner.op, kind)
            for inner in ast.walk(statement.value)
        )
        nodes = self._nodes[(region.name, region.frames.get(node), line, node.target)]
        if len(nodes) % (beside + 1):
            return None
        return nodes.index(node) % (beside + 1) == beside


def _statement(code: CodeType, line: int) -> ast.AugAssign | None:
    """Return the augmented assignment on a line of code, if there is one."""
    text = linecache.getline(code.co_filename, line).strip()
    # A statement may go on below: its lines are read until they parse.
    for more in range(1, 20):
        try:
            parsed = ast.parse(textwrap.dedent(text))
        except SyntaxError:
            following = linecache.getline(code.co_filename, line + more)
            if not following or not any(sign in text for sign in ("=", "(")):
                return None
            text += "\n" + following.strip()
            continue
        return next((n for n in ast.walk(parsed) if isinstance(n, ast.AugAssign)), None)
    return None
