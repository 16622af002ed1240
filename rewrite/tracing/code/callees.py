"""The functions that a call may be of: by name, from a table, or by a local name for either.

TABLE[self.kind](self, x)      f = TABLE.get(kind, g); f(self, x)      any function of the table
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

_MOST, _DEEPEST = 64, 3


def callees(func: ast.expr, tree: ast.AST, scope: Mapping[str, Any]) -> list[FunctionType]:
    """Return the functions that the callee of a call may be, as far as its code spells them.

    Args:
        func: what is called.
        tree: the function around, whose assignments say what its local names stand for.
        scope: the globals.
    """
    if isinstance(func, ast.Attribute) and not isinstance(func.value, ast.Name | ast.Attribute):
        return []  # a method of what a call or an item gives
    found = dict.fromkeys(_spelled(func, tree, scope, 0))
    return list(found)[:_MOST]


def _spelled(
    node: ast.AST, tree: ast.AST, scope: Mapping[str, Any], depth: int
) -> Iterator[FunctionType]:
    if isinstance(node, ast.Attribute):
        holder = scope.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if inspect.ismodule(holder):
            yield from _functions_in(getattr(holder, node.attr, None))
        return
    for name in (part.id for part in ast.walk(node) if isinstance(part, ast.Name)):
        assigned = list(_assigned(tree, name)) if depth < _DEEPEST else []
        for value in assigned:
            if value is not node:
                yield from _spelled(value, tree, scope, depth + 1)
        if not assigned and name in scope:
            yield from _functions_in(scope[name])


def _assigned(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    """Yield what a function assigns to a local name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            targets = [node.target]
        else:
            continue
        if node.value is not None and any(getattr(t, "id", "") == name for t in targets):
            yield node.value


def functions_behind(value: Any) -> tuple[FunctionType, ...]:
    """Return the functions that run when an attribute of a class, or what is called, is used.

    Of a property, a partial, a generic function or a decorated one these are all that it stands
    for: what a decorator puts around a function runs as well as the function.
    """
    found: dict[FunctionType, None] = {}
    pending = [value]
    while pending and len(found) < _MOST:
        one = pending.pop()
        if isinstance(one, FunctionType) and one not in found:
            found[one] = None
        pending += _behind(one)
    return tuple(found)


def _behind(value: Any) -> tuple[Any, ...]:
    """Return what a property, a partial, a bound, decorated or generic function runs."""
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, staticmethod | classmethod | MethodType):
        return (value.__func__,)
    if isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
        return (value.func,)
    if isinstance(value, functools.singledispatchmethod):
        return (value.dispatcher,)
    if isinstance(value, type) or not callable(value):
        return ()
    held = getattr(value, "__dict__", {})
    variants = held.get("registry")
    many = tuple(variants.values()) if isinstance(variants, Mapping) else ()
    return (*many, held["__wrapped__"]) if "__wrapped__" in held else ()


def _functions_in(value: Any, depth: int = 0) -> Iterator[FunctionType]:
    """Yield the functions that a value is, or that a table of them holds."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset) and depth < 2:
        for item in list(value)[:_MOST]:
            yield from _functions_in(item, depth + 1)
        return
    for function in functions_behind(value):
        if not function.__module__.startswith("transformers."):
            yield function
