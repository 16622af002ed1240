"""What a model that came out of a file may look like, whatever form the file had.

    every name is [\\w-]+                            names become source code when fx writes it
    state = what nn.Module puts there               parameters, buffers, modules, flags
    no attribute bears the name of a method         it would be called in the method's place
    no hooks but those by which torch computes weights
    modules contain each other without a circle, at most 200 deep and a million paths

Only the instances are looked at: what their classes do is the business of `allowed_classes`.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rewrite.checkpoint.allowed_classes import HOOKS
from rewrite.checkpoint.graph_format import is_hook_of_weight_norm
from rewrite.checkpoint.pickles.tensors import Reference
from rewrite.checkpoint.pickles.unpickle import hashable
from rewrite.checkpoint.vetting.tree import DEEPEST, check_name
from rewrite.errors import CheckpointError
from rewrite.weights.weight_norm import is_weight_norm_hook

_DEEPEST_DATA, _MOST_PATHS = 100, 1_000_000
_HOOKS = tuple(key for key in vars(nn.Module()) if key.endswith("hooks"))
_FLAGS = tuple(key for key in vars(nn.Module()) if "hooks_" in key)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def check_loaded(model: Any, trust: Sequence[str] = ()) -> nn.Module:
    """Return `model` if it is a module like those that PyTorch makes.

    Args:
        model: What was opened.
        trust: Full names of functions that may be hooks, beside those of torch's weight norms.

    Raises:
        CheckpointError: it is something else, or something in it is; with the place.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"holds a {type(model).__name__}, not an nn.Module")
    _check_tree(model)
    for place, module in _all_modules(model):
        _check_module(place or "the model", module, trust)
    return model


def _check_tree(model: nn.Module) -> None:
    """Raise CheckpointError for a circle, and for trees too deep or too wide to walk."""
    paths: dict[int, int] = {}
    depth: dict[int, int] = {}
    stack: list[tuple[nn.Module, list[nn.Module]]] = [(model, _children(model))]
    open_: set[int] = {id(model)}
    while stack:
        module, waiting = stack[-1]
        if waiting:
            child = waiting.pop()
            if id(child) in open_:
                raise CheckpointError(f"holds a {type(child).__name__} that contains itself")
            if id(child) not in paths:
                open_.add(id(child))
                stack.append((child, _children(child)))
            if len(stack) > DEEPEST:
                raise CheckpointError(f"holds modules that are nested more than {DEEPEST} deep")
            continue
        stack.pop()
        open_.discard(id(module))
        below = _children(module)
        paths[id(module)] = 1 + sum(paths[id(child)] for child in below)
        depth[id(module)] = 1 + max((depth[id(child)] for child in below), default=0)
        if depth[id(module)] > DEEPEST or paths[id(module)] > _MOST_PATHS:
            raise CheckpointError("holds modules that are nested too deep")


def _children(module: nn.Module) -> list[nn.Module]:
    held = vars(module).get("_modules")
    if not isinstance(held, dict):
        raise CheckpointError(f"holds a {type(module).__name__} without children of its own")
    wrong = [key for key, value in held.items() if not isinstance(value, nn.Module | None)]
    if wrong:
        raise CheckpointError(f"holds {str(wrong[0])!r} among modules, which is none")
    return [child for child in held.values() if child is not None]


def _all_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once with its place: children, and those in attributes and containers."""
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while waiting:
        place, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield place, module
        for key, value in vars(module).items():
            for found in _modules_in(value):
                if id(found) not in seen:
                    _check_tree(found)
                waiting.append((f"{place}.{key}" if place else str(key), found))


def _modules_in(value: Any) -> Iterator[nn.Module]:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, nn.Module):
            yield found
        elif id(found) not in seen:
            seen.add(id(found))
            waiting.extend(_parts(found))


def _parts(value: Any) -> Iterable[Any]:
    """Return what a container, a namespace, a dataclass or a partial holds."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, functools.partial):
        return (*value.args, *value.keywords.values())
    if isinstance(value, Namespace | SimpleNamespace):
        return vars(value).values()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return ()


def _check_module(place: str, module: nn.Module, trust: Sequence[str]) -> None:
    held = vars(module)
    for key in held:
        if not isinstance(key, str) or not key.isprintable():
            raise CheckpointError(f"{place}: has an attribute called {key!r}")
    _check_registered(place, held, "_parameters", torch.Tensor)
    _check_registered(place, held, "_buffers", torch.Tensor)
    _check_registered(place, held, "_modules", nn.Module)
    if not isinstance(held.get("training"), bool):
        raise CheckpointError(f"{place}: has no training mode")
    names = held.get("_non_persistent_buffers_set", set())
    if not (isinstance(names, set) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{place}: has a set of buffers that is none")
    for key, value in held.items():
        if key in _HOOKS:
            _check_hooks(place, key, value, trust)
        elif key in _FLAGS:
            _check_flags(place, key, value)
        elif key == "_compiled_call_impl" and value is not None:
            raise CheckpointError(f"{place}: has a compiled call of its own")
        elif key not in _KEPT:
            _check_attribute(place, key, value, type(module))
    for parameter in (*held["_parameters"].values(), *held["_buffers"].values()):
        for hooks in _TENSOR_HOOKS:
            if parameter is not None and getattr(parameter, hooks, None):
                raise CheckpointError(f"{place}: has a parameter with hooks")


_KEPT = frozenset(
    {"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set"}
)


def _check_registered(place: str, held: dict[str, Any], key: str, kind: type) -> None:
    values = held.get(key)
    if not isinstance(values, dict):
        raise CheckpointError(f"{place}: has no {key.strip('_')}")
    for name, value in values.items():
        check_name(name, place, key.strip("_"))
        if not isinstance(value, kind | None):
            raise CheckpointError(
                f"{place}: has {name!r} among its {key.strip('_')}, which is none"
            )


def _check_hooks(place: str, key: str, hooks: Any, trust: Sequence[str]) -> None:
    if not isinstance(hooks, dict):
        raise CheckpointError(f"{place}: has {key} of no kind that PyTorch has")
    for number, hook in hooks.items():
        inner = getattr(hook, "hook", hook)
        known = is_weight_norm_hook(hook) or is_hook_of_weight_norm(hook)
        named = {_full_name(inner), _full_name(type(inner))} & {*HOOKS, *trust}
        if type(number) is not int or not (known or named):
            raise CheckpointError(f"{place}: has {key}, and a file may bring none")


def _check_flags(place: str, key: str, value: Any) -> None:
    if not (isinstance(value, dict) and all(type(flag) is bool for flag in value.values())):
        raise CheckpointError(f"{place}: has {key} of no kind that PyTorch has")


def _full_name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _check_attribute(place: str, key: str, value: Any, kind: type) -> None:
    """Raise CheckpointError for an attribute that hides a method, and for endless data in one."""
    ours = getattr(kind, key, None)
    is_class = isinstance(ours, type) and isinstance(value, type | nn.Module)
    if (callable(ours) and not is_class) or (key.startswith("__") and key.endswith("__")):
        raise CheckpointError(f"{place}: has an attribute {key!r} in the place of a method")
    waiting: list[tuple[Any, int]] = [(value, 0)]
    seen: set[int] = set()
    while waiting:
        found, depth = waiting.pop()
        if isinstance(found, Reference):
            raise CheckpointError(f"{place}: has {key!r}, the bytes of a tensor without the tensor")
        if id(found) in seen:
            continue
        seen.add(id(found))
        if depth > _DEEPEST_DATA:
            raise CheckpointError(f"{place}: has data in {key!r} that is nested too deep")
        if isinstance(found, Mapping):
            for name in found:
                hashable(name)
        waiting.extend((item, depth + 1) for item in _parts(found))
