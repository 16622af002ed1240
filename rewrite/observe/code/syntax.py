"""Functions of a file, calls in them, and tests that a model has decided: `if self.pre_norm`.

A test is decided if it is made of constants and of plain attributes of the module whose forward it
stands in: numbers, strings, None, modules that are there or not. `self.training` is False: what is
observed and promised is eval mode.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

from torch import Tensor, nn

from rewrite.observe.code.state import NotNone
from rewrite.observe.export import in_torch
from rewrite.tracing.taint import path_of


@dataclass(frozen=True, eq=False)
class Function:
    """A function of a file, and the class that it stands in.

    Attributes:
        file: the path of the file.
        node: its definition.
        inside: the name of its class, or "".
    """

    file: str
    node: ast.FunctionDef
    inside: str

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it."""
        return self.file, self.node.lineno

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters, but for those that take any number."""
        args = self.node.args
        return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]

    @property
    def passes_on(self) -> bool:
        """Whether it takes whatever it is given: a decorator's inner function."""
        return self.node.args.vararg is not None

    @property
    def first(self) -> str:
        """The name of its first parameter."""
        return self.parameters[0] if self.parameters else ""


class Undecided(Exception):  # noqa: N818 - a value, not an error
    """A test depends on more than the model."""


@lru_cache(maxsize=256)
def functions_in(file: str) -> tuple[tuple[ast.FunctionDef, str], ...]:
    """Return each function of a file with the name of the class that it stands in, or ""."""
    try:
        made = file.startswith("<")  # a forward that was generated: it is in no file
        text = "".join(linecache.getlines(file)) if made else Path(file).read_text(encoding="utf-8")
        tree = ast.parse(text)
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


@lru_cache(maxsize=65536)
def function_at(file: str, line: int) -> tuple[ast.FunctionDef, str] | None:
    """Return the innermost function that holds a line, and the name of its class."""
    around = [
        (function, inside)
        for function, inside in functions_in(file)
        if function.lineno <= line <= (function.end_lineno or line)
    ]
    return max(around, key=lambda item: item[0].lineno, default=None)


Fixed = frozenset[tuple[str, Any]]
"""Names of a function whose values are known in a call of it: arguments, defaults."""


def function_named(file: str, name: str) -> Function | None:
    """Return the function that a global name of a file stands for, there or where it comes from."""
    outer = [f for f, inside in functions_in(file) if not inside and f.name == name]
    if outer:
        whole = len(outer) == 1 and not outer[0].col_offset
        return Function(file, outer[0], "") if whole else None
    modules = list(sys.modules.values())
    module = next((m for m in modules if getattr(m, "__file__", None) == file), None)
    code = getattr(inspect.unwrap(getattr(module, name, None)), "__code__", None)  # type: ignore[arg-type]  # unwrap returns None for None
    elsewhere = None if code is None or code.co_filename == file else code.co_filename
    return function_named(elsewhere, code.co_name) if code is not None and elsewhere else None


def functions_named(function: Function, name: str) -> list[Function]:
    """Return what a global name in a function stands for, if that is another function."""
    called = function_named(function.file, name)
    return [called] if called is not None and called.key != function.key else []


def decided(
    test: ast.expr, modules: Sequence[nn.Module], first: str, names: Mapping[str, Any]
) -> bool | None:
    """Return what a test is for all of `modules` (each as the function's first argument), or None.

    Args:
        test: the test of an `if`.
        modules: those whose forward it may stand in.
        first: the name of the function's first argument.
        names: other names whose values are known.
    """
    values = known_values(test, modules, first, names)
    truths = {bool(value) for value in values}
    return truths.pop() if len(truths) == 1 else None


def known_values(
    node: ast.expr, modules: Sequence[nn.Module], first: str, names: Mapping[str, Any]
) -> list[Any]:
    """Return what an expression is worth for each of `modules`; [] if that is not known."""
    held: Sequence[nn.Module | None] = modules or [None]
    try:
        return [_value(node, module, first, names) for module in held]
    except Undecided:
        return []


def constants(values: Sequence[Any]) -> list[Any]:
    """Return the number, text or None that all of `values` are, in a list; else []."""
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in values)
    return list(values[:1]) if plain and all(value == values[0] for value in values) else []


def lacks(modules: Sequence[nn.Module], attribute: str) -> bool:
    """Return whether none of the modules has an attribute: a line that reads it cannot run."""
    return bool(modules) and not any(hasattr(module, attribute) for module in modules)


def methods_reach(modules: Sequence[nn.Module], name: str) -> frozenset[str]:
    """Return the attributes that a method of some modules reads of them, and those it calls."""
    found: set[str] = set()
    for kind in {type(module) for module in modules}:
        pending, seen = [name], set[str]()
        while pending:
            method = getattr(kind, pending.pop(), None)
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            body = None if code is None else definition(code)
            if body is None or body.name in seen or not body.args.args:
                continue
            seen.add(body.name)
            first = body.args.args[0].arg
            for part in ast.walk(body):
                if isinstance(part, ast.Attribute) and path_of(part.value) == [first]:
                    found.add(part.attr)
                    pending.append(part.attr)
    return frozenset(found)


def code_of(module: nn.Module | None) -> CodeType | None:
    """Return the code of a module's forward, without what is wrapped around it."""
    return getattr(inspect.unwrap(getattr(module, "forward", None)), "__code__", None)  # type: ignore[arg-type]  # unwrap returns None for None


def forward_of(module: nn.Module | None) -> ast.FunctionDef | None:
    """Return the definition of a module's forward, if it is in a file and not torch's own."""
    code = code_of(module)
    return None if code is None or in_torch(code.co_filename) else definition(code)


def definition(code: CodeType) -> ast.FunctionDef | None:
    """Return the definition that some code was compiled from; its decorators stand above it."""
    later = [
        function
        for function, _ in functions_in(code.co_filename)
        if function.name == code.co_name and function.lineno >= code.co_firstlineno
    ]
    return min(later, key=lambda function: function.lineno, default=None)


def _value(node: ast.expr, module: nn.Module | None, first: str, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and not isinstance(names.get(node.id, NotNone()), NotNone):
        return names[node.id]
    if isinstance(node, ast.IfExp):
        chosen = node.body if _value(node.test, module, first, names) else node.orelse
        return _value(chosen, module, first, names)
    if isinstance(node, ast.Attribute):
        return _attribute(node, module, first)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, module, first, names)
    if isinstance(node, ast.BoolOp):
        return _any_or_all(node, module, first, names)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compared(node, module, first, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
        held, key = node.args
        if isinstance(held, ast.Name) and held.id == first and isinstance(key, ast.Constant):
            return hasattr(module, str(key.value))
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value(item, module, first, names) for item in node.elts]
    raise Undecided


def _attribute(node: ast.Attribute, module: nn.Module | None, first: str) -> Any:
    value = _held(node, module, first)
    if value is None or isinstance(value, bool | int | float | str | nn.Module):
        return value is not None if isinstance(value, nn.Module) else value
    raise Undecided


def _held(node: ast.Attribute, module: nn.Module | None, first: str) -> Any:
    path = [node.attr]
    held: ast.expr = node.value
    while isinstance(held, ast.Attribute):
        path.append(held.attr)
        held = held.value
    if not isinstance(held, ast.Name) or held.id != first or module is None:
        raise Undecided
    if path == ["training"]:
        return False
    value: Any = module
    for name in reversed(path):
        if not hasattr(value, name):
            raise Undecided
        value = getattr(value, name)
    return value


def _any_or_all(
    node: ast.BoolOp, module: nn.Module | None, first: str, names: Mapping[str, Any]
) -> bool:
    deciding = isinstance(node.op, ast.Or)
    unknown = False
    for part in node.values:
        try:
            if bool(_value(part, module, first, names)) is deciding:
                return deciding
        except Undecided:
            unknown = True
    if unknown:
        raise Undecided
    return not deciding


def _is_something(
    node: ast.expr, module: nn.Module | None, first: str, names: Mapping[str, Any]
) -> bool:
    """Return whether an expression is a tensor, or a value that is followed: it is not None."""
    if isinstance(node, ast.Attribute):
        return isinstance(_held(node, module, first), Tensor)
    return isinstance(node, ast.Name) and isinstance(names.get(node.id), NotNone)


def _compared(
    node: ast.Compare, module: nn.Module | None, first: str, names: Mapping[str, Any]
) -> bool:
    operator, asked = node.ops[0], node.left
    if isinstance(operator, ast.Is | ast.IsNot) and _is_something(asked, module, first, names):
        asked = ast.Constant(True)
    left = _value(asked, module, first, names)
    right = _value(node.comparators[0], module, first, names)
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


def children(node: ast.AST) -> list[ast.expr]:
    """Return the expressions that an expression is made of."""
    found: list[ast.expr] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            found.append(child)
        elif isinstance(child, ast.comprehension):
            found += [child.iter, *child.ifs]
        elif isinstance(child, ast.keyword):
            found.append(child.value)
    return found


def fits(function: Function, name: str) -> bool:
    """Return whether a call by that name may have run the function."""
    return function.node.name in (name, "forward", "__call__")


def bound(
    function: Function,
    call: ast.Call,
    given: Sequence[bool],
    named: dict[str | None, bool],
) -> frozenset[str]:
    """Return the parameters of a function that get the value in a call."""
    args = function.node.args
    positional = _positional(function, call)
    found: set[str] = set()
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    if starred and any(given):
        found.update(positional)
    for name, held in zip(positional, given, strict=False):
        if held:
            found.add(name)
    for key, held in named.items():
        if held and key is None:
            found.update(n for n in function.parameters if n in positional or n != function.first)
        elif held and key is not None:
            found.add(
                key if key in function.parameters else (args.kwarg.arg if args.kwarg else key)
            )
    return frozenset(found)


def left_at_default(function: Function, call: ast.Call) -> Fixed:
    """Return the parameters that a call leaves at a constant default."""
    args = function.node.args
    if any(isinstance(a, ast.Starred) for a in call.args) or any(
        k.arg is None for k in call.keywords
    ):
        return frozenset()
    positional = _positional(function, call)
    given = {*positional[: len(call.args)], *(k.arg for k in call.keywords)}
    defaults = dict(zip(positional[::-1], args.defaults[::-1], strict=False))
    defaults |= {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d}
    return frozenset(
        (name, default.value)
        for name, default in defaults.items()
        if isinstance(default, ast.Constant) and name not in given
    )


def given_expressions(function: Function, call: ast.Call) -> dict[str, ast.expr]:
    """Return the expression that a call gives for each parameter that it names or places."""
    if any(isinstance(a, ast.Starred) for a in call.args):
        return {}
    placed = dict(zip(_positional(function, call), call.args, strict=False))
    return placed | {k.arg: k.value for k in call.keywords if k.arg in function.parameters}


def _positional(function: Function, call: ast.Call) -> list[str]:
    """Return the parameters that the positional arguments of a call are given to."""
    args = function.node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    plain = isinstance(call.func, ast.Name) and call.func.id == function.node.name
    static = any(path_of(d) == ["staticmethod"] for d in function.node.decorator_list)
    is_method = names[:1] == ["self"] or (function.inside and not static)
    return names[1:] if is_method and not plain else names


def has_call(node: ast.expr) -> bool:
    """Return whether an expression calls anything."""
    return any(isinstance(part, ast.Call) for part in ast.walk(node))
