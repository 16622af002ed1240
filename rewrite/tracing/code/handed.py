"""Analyze functions stored in attributes of a module that get submodules as arguments.

    self.body(self, x)                  a function or a partial in an attribute
    self.steps[i](self.norm, x)         any of several
    self.policy.run(self, x)            a method of an object
    self.helper(self.norm, x)           a method of its own, here with what its argument is

Which function runs depends on the instance, not on its class. A function without available source
is assumed to read everything that it is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import fields, replace
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn

from rewrite.tracing.code.class_code import ClassCode, Handed, code_given
from rewrite.tracing.code.module_paths import Path


def with_handed(module: nn.Module, code: ClassCode) -> ClassCode:
    """Return `code` with the uses in functions that `module` passes submodules to."""
    found = [code]
    pending, seen = list(code.handed), set(code.handed)
    while pending:
        handed = pending.pop()
        given = tuple(
            (name, path)
            for name, path in handed.given
            if any(isinstance(value, nn.Module) for value in _values(module, path))
        )
        for callee in _values(module, handed.callee) if given else ():
            more = _read(module, callee, replace(handed, given=given))
            found.append(more)
            new = [one for one in more.handed if one not in seen]
            pending += new
            seen.update(new)
    return _joined(found)


def _values(value: Any, path: Path) -> Iterator[Any]:
    """Yield the values at a path below a module; None in a path stands for every item."""
    if not path:
        yield value
        return
    step, left = path[0], path[1:]
    if isinstance(value, dict | nn.ModuleDict):
        items = dict(value.items())
        chosen = list(items.values()) if step is None else [items.get(step)]
    elif isinstance(value, list | tuple | nn.ModuleList | nn.Sequential):
        chosen = list(value) if step is None or not step.isdigit() else [*value][int(step) :][:1]
    else:
        chosen = [] if step is None else [_attribute(value, step)]
    for item in chosen:
        yield from _values(item, left)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of the model: properties are not asked."""
    if name in getattr(value, "__dict__", {}):
        return vars(value)[name]
    if isinstance(value, nn.Module) and name in value._modules:
        return value._modules[name]
    found = inspect.getattr_static(type(value), name, None)
    if isinstance(found, FunctionType):
        return MethodType(found, value)
    return found.__func__ if isinstance(found, staticmethod) else None


def _read(module: nn.Module, callee: Any, handed: Handed) -> ClassCode:
    """Return the analysis of one function for the modules that it is given."""
    function, bound, names_self = _function(module, callee)
    if function is None or function.__module__.partition(".")[0] in ("torch", "builtins"):
        return ClassCode()
    more = None
    if isinstance(function, FunctionType):
        names = function.__code__.co_varnames
        given: dict[str, Path] = {names[0]: ()} if names_self else {}
        for name, path in handed.given:
            if isinstance(name, str):
                given[name] = path
            elif bound + name < len(names):
                given[names[bound + name]] = path
        more = code_given(function, tuple(given.items()))
    if more is None:
        text = f"{handed.use.text}, of which the source is not known,"
        uses = [replace(handed.use, path=path, text=text) for _, path in handed.given]
        more = ClassCode(tensors=uses)
    return more


def _function(module: nn.Module, callee: Any) -> tuple[Any, int, bool]:
    """Return the function of a callable, its number of bound arguments, and if one is `self`."""
    bound, names_self = 0, False
    if isinstance(callee, functools.partial):
        callee, bound = callee.func, len(callee.args)
    if isinstance(callee, nn.Module):
        callee = MethodType(type(callee).forward, callee)
    elif not isinstance(callee, FunctionType | MethodType | BuiltinFunctionType | type(None)):
        callee = _attribute(callee, "__call__")
    if isinstance(callee, MethodType):
        names_self = callee.__self__ is module
        callee, bound = callee.__func__, bound + 1
    callee = inspect.unwrap(callee) if callable(callee) else None
    return (callee if hasattr(callee, "__module__") else None), bound, names_self


def _joined(codes: list[ClassCode]) -> ClassCode:
    joined = ClassCode()
    for part in fields(ClassCode):
        if part.name == "others":
            joined.others = codes[0].others
        else:
            lists = [getattr(code, part.name) for code in codes]
            setattr(joined, part.name, list(dict.fromkeys(x for one in lists for x in one)))
    return joined
