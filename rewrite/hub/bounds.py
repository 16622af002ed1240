"""Hold the counts of a `config.json` to its tensors, before transformers builds lists as long.

layers ≤ max(64, tensors)        other counts ≤ max(65536, tensors, longest axis)

Each layer has a tensor of its own, and each head, expert or label is a row of one. A configuration
with 10⁹ layers would otherwise be built for hours, on the meta device too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from rewrite.errors import CheckpointError
from rewrite.hub.folder import CheckpointFolder

_LAYERS = re.compile(r"(layers?|blocks?|depths?|stages?)$")
_COUNTS = re.compile(r"^(num|n)_|_(num|count)$")
_LEAST_LAYERS, _LEAST_COUNT = 64, 65_536
_PARAMETERS_A_TENSOR = 16
"""How many parameters a class may hold for each stored tensor, which may be several in one."""


def check_counts(folder: CheckpointFolder, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a configuration counts more than the folder's tensors hold.

    Args:
        folder: whose tensors are counted.
        config: the contents of its `config.json`, or a part of them.
    """
    axes = (max(folder.entry(name).shape, default=1) for name in folder.places)
    layers = max(_LEAST_LAYERS, len(folder.places))
    _check(folder, config, "", layers, max(_LEAST_COUNT, layers, *axes))


def _check(
    folder: CheckpointFolder, config: Mapping[str, Any], place: str, layers: int, count: int
) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check(folder, value, f"{place}{key}.", layers, count)
            continue
        layered = _LAYERS.search(str(key)) is not None
        if not (layered or _COUNTS.search(str(key))):
            continue
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        most = layers if layered else count
        if sum(map(abs, numbers)) > most:
            raise CheckpointError(
                f"{folder.path}: its configuration says {place}{key} = {value!s:.40}, more than "
                f"its {len(folder.places)} tensors can hold"
            )


@contextlib.contextmanager
def no_more_parameters(folder: CheckpointFolder) -> Iterator[None]:
    """Refuse to build a class that holds far more parameters than the folder has tensors.

    Raises:
        CheckpointError: it is about to.
    """
    most = 1024 + _PARAMETERS_A_TENSOR * len(folder.places)
    count = 0

    def registered(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        count += value is not None
        if count > most:
            raise CheckpointError(
                f"{folder.path}: its configuration asks for more than {most} parameters, more than "
                f"its {len(folder.places)} tensors can hold"
            )

    handle = hooks.register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
