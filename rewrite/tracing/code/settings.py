"""Plain values that the code of a module reads from its attributes: numbers, texts, few of them.

self.scale, self.options.power      what a graph in the place of that code keeps as it was
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rewrite.tracing.code.class_code import code_of

_NONE = object()

_FEW = 4


def settings_of(module: nn.Module) -> tuple[str, ...]:
    """Return which plain values the code of a module's class reads, as "scale = 2.0"."""
    found: dict[str, None] = {}
    for use in code_of(type(module)).reads:
        value = _followed(module, use.path or ())
        if use.path != ("training",) and _is_setting(value):
            found[f"{'.'.join(map(str, use.path or ()))} = {value!r}"] = None
    return tuple(found)


def _followed(module: nn.Module, path: tuple[str | None, ...]) -> Any:
    """Return the value at a path of attributes, none of which is another module's."""
    value: Any = module
    for step in path:
        own = value is module or not isinstance(value, nn.Module)
        value = vars(value).get(step, _NONE) if own and hasattr(value, "__dict__") else _NONE
    return value


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= _FEW and all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | complex | str)
