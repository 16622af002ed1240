"""Taint analysis of one function: which names depend on its arguments.

A name is tainted if it is one of the given parameters or computed from one. The result of a call is
not tainted, except of a builtin or of a method of a tainted value. Code is *chosen* by a tainted
name if that decides whether it runs, or if it computes with it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Iterator, Set
from typing import Any

_Comprehension = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


class TaintAnalysis:
    """The tainted names of one function, and the code and calls that depend on them.

    Attributes:
        parameters: the tainted parameters.
        first: the name of its first parameter.
        chosen: the code that a tainted name chooses; None where that may be any code.
        calls: the calls with a tainted argument.

    Args:
        code: the function.
        tainted: its tainted parameters.
        ignored: attributes and methods that do not depend on values, such as the shape.
    """

    def __init__(
        self, code: ast.Module, tainted: frozenset[str], *, ignored: frozenset[str] = frozenset()
    ) -> None:
        self.parameters = tainted
        self._ignored = ignored
        self._code = code
        self._assigned = list(_assignments(code))
        definition = code.body[0]
        arguments = definition.args.args if isinstance(definition, ast.FunctionDef) else []
        self.first = arguments[0].arg if arguments else ""
        self._tainted = set(tainted)
        size = 0
        while size < len(self._tainted):
            size = len(self._tainted)
            for target, value in self._assigned:
                if self._depends(value, calls=False):
                    self._tainted |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        self._given: dict[tuple[ast.Call, Any], frozenset[str]] = {}
        self.chosen = self._with_aliases(list(self._choices(definition, False)))
        self.calls = [n for n in ast.walk(code) if isinstance(n, ast.Call) and self._gets(n)]

    def _depends(self, node: ast.AST, calls: bool = True) -> bool:
        """Return whether `node` contains a tainted name; without `calls`, outside of arguments."""
        if isinstance(node, ast.Name):
            return node.id in self._tainted
        if isinstance(node, ast.Attribute) and node.attr in self._ignored:
            return False
        if isinstance(node, ast.Call) and not calls:
            path = path_of(node.func)
            if not (len(path) == 1 and hasattr(builtins, path[0])):
                return self._depends(node.func, calls)
        return any(self._depends(child, calls) for child in ast.iter_child_nodes(node))

    def spells(self, code: ast.AST) -> bool:
        """Return whether `code` mentions a tainted name."""
        return self._depends(code)

    def _gets(self, call: ast.Call) -> bool:
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        return any(self._depends(value, calls=False) for value in values)

    def _choices(self, node: ast.AST, tested: bool) -> Iterator[ast.AST | None]:
        if isinstance(node, ast.Assert) or self._is_own_default(node):
            return
        test = getattr(node, "test", None)
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            parts = _parts(node)
            if self._depends(node.test) and not all(self._is_harmless(part) for part in parts):
                yield from parts
        elif isinstance(node, ast.For | ast.AsyncFor) and self._depends(node.iter, calls=False):
            yield from (*node.body, node.iter)
        elif isinstance(node, ast.Match) and self._depends(node.subject):
            yield from node.cases
        elif isinstance(node, ast.BoolOp) and not tested and self._depends(node):
            yield from node.values
        elif isinstance(node, _Comprehension) and any(
            self._depends(part) for g in node.generators for part in (g.iter, *g.ifs)
        ):
            yield node
        elif isinstance(node, ast.Subscript) and self._depends(node.slice):
            yield _standing_at(node) if isinstance(node.value, ast.Call) else node.value
        elif isinstance(node, ast.BinOp) and self._depends(node, calls=False):
            yield _standing_at(node)  # it runs in any case, with another number
        elif isinstance(node, ast.Call) and path_of(node.func) == ["getattr"] and self._gets(node):
            yield None
        for child in ast.iter_child_nodes(node):
            within = tested and isinstance(child, ast.BoolOp | ast.UnaryOp)
            yield from self._choices(child, child is test or within)

    def _is_harmless(self, statement: ast.AST) -> bool:
        return isinstance(statement, ast.Raise) or self._is_own_default(statement)

    def by_none(self, names: Set[str]) -> tuple[set[str], list[ast.AST]]:
        """Return which of `names` are compared with None, and the code that this chooses.

        In a trace they are proxies, which are not None; any other test of a proxy raises.
        """
        found: set[str] = set()
        chosen: list[ast.AST] = []
        for node in ast.walk(self._code):
            if isinstance(node, ast.If | ast.IfExp) and (
                named := names & set(_compared(node.test))
            ):
                parts = _parts(node)
                if not all(isinstance(part, ast.Raise) for part in parts):
                    found |= named
                    chosen += parts
        return found, self._with_aliases(chosen)

    def _is_own_default(self, node: ast.AST) -> bool:
        """Return whether `node` only fills in a default: `n = n if n is not None else 3`."""
        if not isinstance(node, ast.Assign) or any(
            isinstance(part, ast.Call) for part in ast.walk(node.value)
        ):
            return False
        return all(isinstance(t, ast.Name) and t.id in self.parameters for t in node.targets)

    def given(self, call: ast.Call, function: Callable[..., Any], skip: int) -> frozenset[str]:
        """Return the parameters of `function` that get a tainted value in `call`."""
        if (call, function) not in self._given:
            self._given[call, function] = self._bind(call, function, skip)
        return self._given[call, function]

    def _bind(self, call: ast.Call, function: Callable[..., Any], skip: int) -> frozenset[str]:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
        named = {p.name for p in parameters}
        loose = [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        optional = [p.name for p in parameters if p.default is not p.empty]
        by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        found: set[str] = set()
        for position, value in enumerate(call.args):
            if not self._depends(value, calls=False):
                continue
            if isinstance(value, ast.Starred):
                found.update(p.name for p in parameters[position:])
            elif position < len(by_place):
                found.add(by_place[position].name)
            else:
                found.update(loose)
        for keyword in call.keywords:
            if self._depends(keyword.value, calls=False):
                if keyword.arg is None:
                    found.update(optional, loose)
                else:
                    found.update([keyword.arg] if keyword.arg in named else loose)
        return frozenset(found)

    def _with_aliases(self, parts: list[Any]) -> list[Any]:
        """Return `parts` and the expressions assigned to their names: `conv = self.block.conv`."""
        names: set[str] = set()
        size = -1
        while size < len(names):
            size = len(names)
            code = [part for part in parts if part is not None]
            names |= {n.id for p in code for n in ast.walk(p) if isinstance(n, ast.Name)}
            for target, value in self._assigned:
                held = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
                if held & names and value not in parts and not isinstance(value, ast.Call):
                    parts = [*parts, value]
        return parts


def _standing_at(node: ast.AST) -> ast.AST:
    """Return code that does nothing, on the lines of `node`."""
    return ast.copy_location(ast.Pass(), node)


def _assignments(code: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    for node in ast.walk(code):
        if isinstance(node, ast.Assign):
            yield from ((target, node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
            yield node.target, node.value
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            yield node.target, node.iter


def path_of(node: ast.AST) -> list[str]:
    """Return ["self", "block", "conv"] for `self.block.conv`, [] for anything but names."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (path := path_of(node.value)):
        return [*path, node.attr]
    return []


def is_super(node: ast.AST) -> bool:
    """Return whether `node` is an attribute of `super()`."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and path_of(node.value.func) == ["super"]
    )


def _parts(node: ast.If | ast.IfExp | ast.While) -> list[ast.AST]:
    bodies = [node.body, node.orelse]
    return [part for body in bodies for part in (body if isinstance(body, list) else [body])]


def _compared(test: ast.AST) -> Iterator[str]:
    """Yield the names that a test compares by identity."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            yield from (n.id for n in (node.left, *node.comparators) if isinstance(n, ast.Name))
