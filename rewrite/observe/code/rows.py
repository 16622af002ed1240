"""Expressions that choose among the rows of a value, whose channels stay what they are.

h[:, -1]      h[:, i, :]      take_along_dim(h, i, dim=1)
"""

from __future__ import annotations

import ast

from rewrite.tracing.taint import path_of


def selects_rows(node: ast.expr, rank: int) -> bool:
    """Return whether an expression chooses among the rows of a value and leaves its last axis.

    Args:
        node: `take_along_dim(x, i, dim=1)`, `x[:, i]`, `x[:, i, :]` and the like.
        rank: how many axes the value has at least.
    """
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        plain = not any(isinstance(p, ast.Starred) or _is_ellipsis(p) for p in parts)
        last = parts[-1]
        whole = isinstance(last, ast.Slice) and (last.lower, last.upper, last.step) == (None,) * 3
        return plain and (len(parts) < rank or (len(parts) == rank and whole))
    if isinstance(node, ast.Call) and path_of(node.func)[-1:] in (
        ["take_along_dim"],
        ["index_select"],
    ):
        given = [k.value for k in node.keywords if k.arg == "dim"]
        return (
            bool(given)
            and isinstance(given[0], ast.Constant)
            and (isinstance(given[0].value, int) and 0 <= given[0].value < rank - 1)
        )
    return False


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis
