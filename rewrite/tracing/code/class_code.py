"""Analyze the source of a module class: how its code uses submodules besides calling them.

    isinstance(self.norm, nn.BatchNorm1d)      a test: a replacement may fail it
    self.bn.num_features                       a read: a replacement may lack the attribute
    sum(p.pow(2).sum() for p in self.parameters())       a read of every tensor below
    self.bn[self.domain](x)                    a choice by the value of an attribute
    self.cache = x[..., -2:]                   an assignment

Analyzed are `forward` and all functions that it reaches: methods by name, properties, methods of
base classes, and functions of the same file that take a module as an argument.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

from rewrite.tracing.code.callees import functions_behind
from rewrite.tracing.code.module_paths import Path
from rewrite.tracing.code.reader import ClassCode as ClassCode
from rewrite.tracing.code.reader import Handed as Handed
from rewrite.tracing.code.reader import ModuleUse as ModuleUse
from rewrite.tracing.code.reader import Reader

_ADAPTERS = "transformers.integrations."
"""Where methods load adapters: `self.config.add_adapter` in a forward calls none of them."""


_IMPLICIT = (
    "__call__", "__getattr__", "__getattribute__", "__len__", "__bool__", "__iter__",
    "__contains__", "__getitem__",
)  # fmt: skip
"""Methods that run though no code spells their names."""


def code_of(kind: type) -> ClassCode:
    """Return the analysis of a class, cached until one of its functions is replaced."""
    return _read(kind, tuple((name, *several) for name, several in _methods(kind).items()))


@lru_cache(maxsize=256)
def _read(kind: type, named: tuple[tuple[Any, ...], ...]) -> ClassCode:
    methods: dict[str, list[tuple[FunctionType, ...]]] = {name: several for name, *several in named}
    found = ClassCode()
    reached: set[str] = set()
    pending = ["forward", *(name for name in _IMPLICIT if name in methods)]
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        for functions in methods.get(name, ()):
            for function in functions:
                reader = Reader(function, {}, found)
                reader.read()
                found.functions.append(function.__code__)
                pending += [word for word in reader.words if word in methods]
            if all("super" not in function.__code__.co_names for function in functions):
                break  # what it overrides does not run
    for name, variants in methods.items():
        if name not in reached and not name.startswith("_") and name not in ("train", "eval"):
            aside = ClassCode()
            for function in variants[0]:
                Reader(function, {}, aside).read()
            found.elsewhere += aside.stores
            read = (use.path for use in aside.reads if use.path and use.path != (None,))
            found.others[name] = [*aside.calls, *read]
            found.others[name] += [use.path for use in aside.tensors if use.path is not None]
    _once(found)
    return found


@lru_cache(maxsize=1024)
def code_given(function: FunctionType, given: tuple[tuple[str, Path], ...]) -> ClassCode | None:
    """Return the analysis of a function, given which of its arguments are which modules.

    None if its source is not available. Cached, like that of a class.
    """
    found = ClassCode()
    if not Reader(function, dict(given), found).read():
        return None
    _once(found)
    return found


def _once(found: ClassCode) -> None:
    """Remove duplicate uses: a function is analyzed once for each meaning of its names."""
    for name in (
        "tests", "reads", "tensors", "choices", "assigned", "contexts", "stores", "moved", "handed",
    ):  # fmt: skip
        uses: list[Any] = getattr(found, name)
        uses[:] = dict.fromkeys(uses)
    found.elsewhere[:] = dict.fromkeys(found.elsewhere)
    found.calls[:] = dict.fromkeys(found.calls)


def _methods(kind: type) -> dict[str, list[tuple[FunctionType, ...]]]:
    """Return the functions of a class and its bases by name, without those of torch."""
    found: dict[str, list[tuple[FunctionType, ...]]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        if base.__module__.startswith(_ADAPTERS):
            continue
        for name, value in vars(base).items():
            if functions := tuple(f for f in functions_behind(value) if not _is_of_torch(f)):
                found.setdefault(name, []).append(functions)
    return found


def _is_of_torch(function: FunctionType) -> bool:
    """Return whether a function is one of torch, as the wrapper of `torch.no_grad` is."""
    return str(function.__globals__.get("__name__", "")).partition(".")[0] == "torch"
