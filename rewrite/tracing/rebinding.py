"""Size-dependent branches that only rebind local names: what they may read and assign.

    if x.ndim == 3:                  # x may be another value from here on,
        x = x.unsqueeze(0)           # every later line reads it as it would have

Neither branch calls a layer, writes into a tensor, changes a counter or leaves the function, so
both continue with the same code. A name that holds a number must not occur in any other statement,
or it could decide what later lines do. Uncertain are the values that the rebound names had before,
and those that the branch computes; whatever later lines compute from them has the readers that the
graph shows, whichever branch was taken.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping
from dataclasses import replace
from types import CodeType

from torch import Tensor
from torch.fx import Node

from rewrite.tracing.records import Decision
from rewrite.tracing.taint import path_of

_FUNCTIONS = frozenset({"torch", "F", "math"})
"""Modules whose functions return new values, unless their name ends with an underscore."""

_BUILTINS = frozenset({"int", "float", "bool", "len", "max", "min", "abs", "tuple", "list"})

_PLAIN = (
    ast.Constant, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp,
    ast.IfExp, ast.Subscript, ast.Slice, ast.Starred, ast.keyword,
    ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context,
)  # fmt: skip


def touched_by_rebinding(
    decision: Decision,
    statement: ast.stmt | None,
    function: ast.AST | None,
    lines: Mapping[Node, tuple[CodeType, int]],
) -> list[Node] | None:
    """Return the values that a branch of `function` may read or replace; None if it may do more."""
    if not isinstance(statement, ast.If) or function is None:
        return None
    own = _own_names(statement, function)
    held = decision.held | dict.fromkeys(own, ())
    if not _only_rebinds(statement, replace(decision, held=held), own):
        return None
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    found = [node for name in names for node in decision.held.get(name, ())]
    begin = decision.code.co_firstlineno - 1
    first, last = begin + statement.lineno, begin + (statement.end_lineno or statement.lineno)
    for node in decision.nodes:
        code, line = lines.get(node, (None, 0))
        if code is decision.code and first <= line <= last:
            found.append(node)
    return found


def _own_names(statement: ast.stmt, function: ast.AST) -> set[str]:
    """Return the names that a statement assigns and that occur nowhere else in the function."""
    inside = set(ast.walk(statement))
    spelled: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            spelled.add(node.arg)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            spelled.update(node.names)
        elif isinstance(node, ast.Name) and node not in inside:
            spelled.add(node.id)
    assigned = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return assigned - spelled


def _only_rebinds(statement: ast.stmt, decision: Decision, own: set[str]) -> bool:
    if isinstance(statement, ast.If):
        parts = (*statement.body, *statement.orelse)
        return all(_only_rebinds(part, decision, own) for part in parts)
    if isinstance(statement, ast.Assign):
        names = [n for t in statement.targets for n in getattr(t, "elts", [t])]
        known = all(_is_tensor(n, decision) or getattr(n, "id", "") in own for n in names)
        return known and _is_new(statement.value, decision)
    return isinstance(statement, ast.Pass | ast.Raise | ast.Assert)


def _is_tensor(target: ast.AST, decision: Decision) -> bool:
    """Return whether a name held tensors; a number could decide what later lines do."""
    nodes = decision.held.get(target.id, ()) if isinstance(target, ast.Name) else ()
    return bool(nodes) and all(isinstance(node.meta.get("val"), Tensor) for node in nodes)


def _is_new(node: ast.AST, decision: Decision) -> bool:
    """Return whether an expression only computes new values from local ones."""
    if isinstance(node, ast.Name):
        return node.id in decision.held
    if isinstance(node, ast.Attribute):
        number = ".".join(path_of(node)) in decision.held
        return number or _is_constant(node) or _is_new(node.value, decision)
    if isinstance(node, ast.Call):
        parts = [*node.args, *node.keywords]
        if any(keyword.arg in ("out", "inplace", None) for keyword in node.keywords):
            return False
        return _is_pure(node.func, decision) and all(_is_new(part, decision) for part in parts)
    children = ast.iter_child_nodes(node)
    return isinstance(node, _PLAIN) and all(_is_new(child, decision) for child in children)


def _is_pure(function: ast.expr, decision: Decision) -> bool:
    """Return whether a call is of a function of torch, of a builtin, or of a tensor's method."""
    path = path_of(function)
    if path and path[0] not in decision.held:
        if len(path) == 1:
            return path[0] in _BUILTINS and hasattr(builtins, path[0])
        functional = path[:2] == ["nn", "functional"]
        known = functional or (path[0] in _FUNCTIONS and len(path) == 2)
        return known and not path[-1].endswith("_")
    if not isinstance(function, ast.Attribute) or function.attr.endswith("_"):
        return False
    return _is_new(function.value, decision)


def _is_constant(node: ast.Attribute) -> bool:
    """Return whether an attribute is a constant of torch, such as `torch.float16`."""
    path = path_of(node)
    return len(path) == 2 and path[0] == "torch"
