"""Parse the source of a function, a code object or a class, wherever it stands in a file."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any


def source_of(target: Callable[..., Any] | CodeType) -> ast.Module | None:
    """Return the syntax of a function, a code object or a class, its first line being line 1.

    Of a lambda in the middle of a statement these are the lambdas that begin on its line with its
    arguments. None where there is no source: builtins, code that `exec` made, a file that is gone.
    """
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(target)))
    except (OSError, TypeError):
        return None
    except SyntaxError:
        return _lambdas(target)


@lru_cache(maxsize=64)
def functions_in(kind: type, skipped: str) -> tuple[ast.FunctionDef, ...]:
    """Return the functions in the code of a class and of its bases, the nearest class first.

    Args:
        kind: the class.
        skipped: bases of modules whose name begins so are left out, as `object` is.
    """
    bases = (b for b in kind.__mro__ if b is not object and not b.__module__.startswith(skipped))
    trees = (tree for base in bases if (tree := source_of(base)) is not None)
    return tuple(n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))


def _lambdas(target: Callable[..., Any] | CodeType) -> ast.Module | None:
    """Return the lambdas with the arguments of `target` that begin on its line.

    A lambda may stand in the middle of a statement of several lines, which is no source by itself.
    """
    code = target if isinstance(target, CodeType) else getattr(target, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    lines, _ = inspect.findsource(code)
    try:
        whole = ast.parse("".join(lines))
    except SyntaxError:  # the file is another one by now
        return None
    names = list(code.co_varnames[: code.co_argcount])
    found: list[ast.stmt] = [
        ast.Expr(node)
        for node in ast.walk(whole)
        if isinstance(node, ast.Lambda)
        and node.lineno == code.co_firstlineno
        and [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)] == names
    ]
    tree = ast.Module(found, [])
    return ast.increment_lineno(tree, 1 - code.co_firstlineno) if found else None
