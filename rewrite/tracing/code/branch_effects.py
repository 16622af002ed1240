"""What code that a trace did not take may do: which modules it calls, what it reads, and where.

A value that a line of a forward computes is read by no code of that forward that has run by then.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any

from rewrite.tracing.code.source import source_of

Line = tuple[CodeType | None, int]
"""A function, and a line of its file."""

UNKNOWN: Line = (None, 0)


@dataclass
class BranchEffects:
    """What the code of one module may do for another value of an argument, a size or a mode.

    Attributes:
        arguments: the names of the arguments, in that code.
        called: names of attributes that such code calls, each the last of its path.
        used: names of attributes that it mentions in any other way, and texts.
        anything: whether it may call any submodule.
        incoming: whether it may read a value that the module was given.
        ends: the last line of such code, by the forward that it is part of or called from; None
            stands for code that is called from elsewhere.
        sizes: the lines that branch on a size or a mode, each with the condition, in words.
    """

    arguments: dict[str, None]
    called: set[str]
    used: set[str]
    anything: bool = False
    incoming: bool = False
    ends: dict[CodeType | None, int] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The condition under which it does so, in words."""
        if self.sizes:
            return f"{next(iter(self.sizes.values()))} ({', '.join(self.sizes)})"
        return f"for another value of its argument {', '.join(self.arguments)}"

    def is_over(self, code: CodeType, line: int) -> bool:
        """Return whether all of that code has run when `line` of the module's forward does.

        It then reads no value that this line computes.
        """
        known = self.ends.keys() == {code} and self.ends[code] < line
        return known and not self.sizes and _runs_in_order(code)

    def may_call(self, path: str) -> bool:
        """Return whether that code may call the submodule at `path`."""
        parts = path.split(".")
        item = parts[-1].isdigit()
        while len(parts) > 1 and parts[-1].isdigit():
            parts.pop()
        return self.anything or parts[-1] in self.used or (not item and parts[-1] in self.called)


def line_of(function: Callable[..., Any], part: ast.AST | None) -> Line:
    """Return the last line of a part of a function."""
    code: CodeType = function.__code__
    last = getattr(part, "end_lineno", None)
    return UNKNOWN if last is None else (code, code.co_firstlineno - 1 + last)


def until(effects: BranchEffects, at: Line) -> None:
    """Note that effects come from code up to a line."""
    code, line = at
    effects.ends[code] = max(line, effects.ends.get(code, 0))


@lru_cache(maxsize=4096)
def _runs_in_order(code: CodeType) -> bool:
    """Return whether no line of a function runs after one that stands below it."""
    tree = source_of(code)
    if tree is None:
        return False
    inner = [node for node in ast.walk(tree) if node is not tree.body[0]]
    return not any(isinstance(node, _REPEATED) for node in inner)


_REPEATED = (
    ast.For, ast.AsyncFor, ast.While, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
    ast.Lambda, ast.Yield, ast.YieldFrom,
)  # fmt: skip


def spell(code: ast.AST, choices: BranchEffects) -> None:
    """Note the attributes that a piece of code mentions."""
    called = {id(n.func) for n in ast.walk(code) if isinstance(n, ast.Call)}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute):
            (choices.called if id(node) in called else choices.used).add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            choices.used.add(node.value)
