"""Functions of a file, and tests in them that a model has decided: `if self.do_layer_norm_before`.

A test is decided if it is made of constants and of plain attributes of the module whose forward it
stands in: numbers, strings, None, modules that are there or not. `self.training` is False: what is
observed and promised is eval mode.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn


class Undecided(Exception):  # noqa: N818 - a value, not an error
    """A test depends on more than the model."""


@lru_cache(maxsize=256)
def functions_in(file: str) -> tuple[tuple[ast.FunctionDef, str], ...]:
    """Return each function of a file with the name of the class that it stands in, or ""."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    found: list[tuple[ast.FunctionDef, str]] = []

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                found.append((child, inside))
            visit(child, child.name if isinstance(child, ast.ClassDef) else inside)

    visit(tree, "")
    return tuple(found)


def function_at(file: str, line: int) -> tuple[ast.FunctionDef, str] | None:
    """Return the innermost function that holds a line, and the name of its class."""
    around = [
        (function, inside)
        for function, inside in functions_in(file)
        if function.lineno <= line <= (function.end_lineno or line)
    ]
    return max(around, key=lambda item: item[0].lineno, default=None)


def decided(test: ast.expr, modules: Sequence[nn.Module], first: str) -> bool | None:
    """Return what a test is for all of `modules` (each as the function's first argument), or None.

    Args:
        test: the test of an `if`.
        modules: those whose forward it may stand in.
        first: the name of the function's first argument.
    """
    values = set()
    for module in modules:
        try:
            values.add(bool(_value(test, module, first)))
        except Undecided:
            return None
    return values.pop() if len(values) == 1 else None


def lacks(modules: Sequence[nn.Module], attribute: str) -> bool:
    """Return whether none of the modules has an attribute: a line that reads it cannot run."""
    return bool(modules) and not any(hasattr(module, attribute) for module in modules)


def _value(node: ast.expr, module: nn.Module, first: str) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        return _attribute(node, module, first)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, module, first)
    if isinstance(node, ast.BoolOp):
        return _any_or_all(node, module, first)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compared(node, module, first)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
        held, key = node.args
        if isinstance(held, ast.Name) and held.id == first and isinstance(key, ast.Constant):
            return hasattr(module, str(key.value))
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value(item, module, first) for item in node.elts]
    raise Undecided


def _attribute(node: ast.Attribute, module: nn.Module, first: str) -> Any:
    path = [node.attr]
    held: ast.expr = node.value
    while isinstance(held, ast.Attribute):
        path.append(held.attr)
        held = held.value
    if not isinstance(held, ast.Name) or held.id != first:
        raise Undecided
    if path == ["training"]:
        return False
    value: Any = module
    for name in reversed(path):
        if not hasattr(value, name):
            raise Undecided
        value = getattr(value, name)
    if value is None or isinstance(value, bool | int | float | str | nn.Module):
        return value is not None if isinstance(value, nn.Module) else value
    raise Undecided


def _any_or_all(node: ast.BoolOp, module: nn.Module, first: str) -> bool:
    deciding = isinstance(node.op, ast.Or)
    unknown = False
    for part in node.values:
        try:
            if bool(_value(part, module, first)) is deciding:
                return deciding
        except Undecided:
            unknown = True
    if unknown:
        raise Undecided
    return not deciding


def _compared(node: ast.Compare, module: nn.Module, first: str) -> bool:
    left, right = _value(node.left, module, first), _value(node.comparators[0], module, first)
    operator = node.ops[0]
    if isinstance(operator, ast.Is | ast.Eq):
        return bool(left is right if isinstance(operator, ast.Is) else left == right)
    if isinstance(operator, ast.IsNot | ast.NotEq):
        return bool(left is not right if isinstance(operator, ast.IsNot) else left != right)
    if isinstance(operator, ast.In | ast.NotIn):
        return bool(left in right) is isinstance(operator, ast.In)
    if isinstance(left, int | float) and isinstance(right, int | float):
        if isinstance(operator, ast.Gt):
            return left > right
        if isinstance(operator, ast.Lt):
            return left < right
        if isinstance(operator, ast.GtE):
            return left >= right
        if isinstance(operator, ast.LtE):
            return left <= right
    raise Undecided
