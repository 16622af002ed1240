"""Lines of code that no trace followed and that write in place, by their spelling."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rewrite.provenance import shown_path
from rewrite.tracing.code.source import source_of

_HARMLESS = frozenset({"requires_grad_", "retain_grad_", "share_memory_"})


@dataclass(frozen=True)
class Written:
    """A line that writes in place: where it stands, and its text."""

    place: str
    text: str


def untraced_writes(module: nn.Module) -> Iterator[Written]:
    """Yield the lines of the forward of `module` that write in place."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    function = inspect.unwrap(type(module).forward)
    code = source_of(function)
    if code is None:
        return
    lines, first = inspect.getsourcelines(function)
    file = shown_path(function.__code__.co_filename)
    met: set[int] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.stmt | ast.expr) and _writes(node) and node.lineno not in met:
            met.add(node.lineno)
            yield Written(f"{file}:{first + node.lineno - 1}", lines[node.lineno - 1].strip())


def _writes(node: ast.stmt | ast.expr) -> bool:
    if isinstance(node, ast.AugAssign):
        number = isinstance(node.value, ast.Constant)
        return isinstance(node.target, ast.Name | ast.Subscript) and not number
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Subscript) for target in node.targets)
    if not isinstance(node, ast.Call):
        return False
    for keyword in node.keywords:
        if keyword.arg == "out":
            return True
        if keyword.arg == "inplace" and getattr(keyword.value, "value", True) is True:
            return True
    name = str(getattr(node.func, "attr", ""))
    return name.endswith("_") and not name.startswith("_") and name not in _HARMLESS
