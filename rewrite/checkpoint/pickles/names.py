"""Check a name from a file as text before it is looked up in any module.

    name -> a tensor's builder | a plain value's builder | a value | a layer | an enum | nothing

A name that nobody allowed is refused before its module is imported: importing a module runs it.
With `--trust` the user names packages (their classes may be instances) or single classes and
functions; what `builtins`, `os` and their like hold is refused whatever is trusted.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn

from rewrite.checkpoint.allowed_classes import MOVED, Standing, standing
from rewrite.checkpoint.allowed_functions import FUNCTION_PLACES, held_function
from rewrite.checkpoint.factory import current_folder_importable
from rewrite.checkpoint.graph_format import SavedForward, SavedGraph, SavedParametrized
from rewrite.checkpoint.pickles import natives, tensors
from rewrite.errors import CheckpointError, one_line
from rewrite.text.suggest import how_to_install


class NameUse(enum.Enum):
    """What a file may do with a name."""

    TENSOR = "builds a tensor"
    NATIVE = "builds a plain value"
    VALUE = "is a value"
    FUNCTION = "is a function that a module keeps"
    LAYER = "is a class of instances, and a value"
    INSTANCE = "is a class of instances"
    ENUM = "is an enum"
    SAVED = "is what rewrite.save writes"
    MEMBER = "looks a member of an enum up"
    PARTIAL = "is functools.partial"
    REBUILD = "makes an instance, as the first protocols do"
    PLACE = "is where torch keeps functions, or a kind of storage"


HELD = frozenset({NameUse.TENSOR, NameUse.VALUE, NameUse.FUNCTION, NameUse.LAYER, NameUse.ENUM})
"""Uses of names that may stand as values."""

PARTIALS = frozenset({NameUse.LAYER, NameUse.FUNCTION})
"""Uses of names that a `functools.partial` may be of."""


@dataclass(frozen=True)
class Meaning:
    """What a name stands for, and what the file may do with it."""

    use: NameUse
    value: Any = None


_SAVED = {
    f"{place}.{kind.__name__}": Meaning(NameUse.SAVED, kind)
    for place in ("rewrite.checkpoint", "rewrite.graphfile")
    for kind in (SavedForward, SavedGraph, SavedParametrized)
}
"""What `rewrite.save` writes for modules that cannot be pickled, and wrote until 0.1.0."""

_SPECIAL = {
    **_SAVED,
    "builtins.getattr": Meaning(NameUse.MEMBER),
    "functools.partial": Meaning(NameUse.PARTIAL),
    "copyreg._reconstructor": Meaning(NameUse.REBUILD),
    "copyreg.__newobj__": Meaning(NameUse.REBUILD),
    **{place: Meaning(NameUse.PLACE) for place in (*tensors.STORAGES, *FUNCTION_PLACES)},
}


def has_meaning(name: str) -> bool:
    """Say whether a name is a value, or a function that a module may keep; looked up."""
    return any(name in known for known in _OWN_VALUES) or held_function(name) is not None


def own_values() -> frozenset[str]:
    """Return the names of which this package makes a value itself: `allowed_values.json`."""
    return frozenset().union(*_OWN_VALUES)


_OWN_VALUES = (_SPECIAL, tensors.BUILDERS, natives.BUILDERS, natives.CONSTANTS)
"""Names by what this package makes of each."""


def meaning_of(name: str, trust: Sequence[str]) -> Meaning:
    """Return what a name that `refuse_unless_allowed` let through means.

    Raises:
        CheckpointError: it is not there, or is something else than it has to be.
    """
    for found in (_SPECIAL.get(name), _builder(name), _value(name)):
        if found is not None:
            return found
    value = _find(MOVED.get(name, name))
    if name in trust and not (isinstance(value, type) and issubclass(value, enum.Enum)):
        return Meaning(NameUse.LAYER if isinstance(value, type) else NameUse.FUNCTION, value)
    listed = standing(MOVED.get(name, name))
    fix = f"pass --trust {name} to allow just that"
    if not isinstance(value, type):
        raise CheckpointError(f"names {name}, a function; only classes are opened; {fix}")
    home = f"{value.__module__}.{value.__qualname__}"
    package = home.partition(".")[0]
    if package not in trust and standing(home) is None:
        raise CheckpointError(
            f"names {name}, which is {home} of a package that is not trusted; "
            f"pass --trust {package}"
        )
    if issubclass(value, torch.fx.GraphModule):
        raise CheckpointError(
            f"names {name}, a pickled GraphModule, which holds source code; write it with "
            "rewrite.save"
        )
    if issubclass(value, enum.Enum):
        return Meaning(NameUse.ENUM, value)
    if listed is Standing.LAYER and not issubclass(value, nn.Module):
        raise CheckpointError(f"names {name}, which is no layer here; {fix}")
    return Meaning(NameUse.INSTANCE if listed is Standing.INSTANCE else NameUse.LAYER, value)


def _builder(name: str) -> Meaning | None:
    if name in tensors.BUILDERS:
        return Meaning(NameUse.TENSOR, tensors.Rebuild(name))
    return (
        Meaning(NameUse.NATIVE, natives.CONSTANTS.get(name)) if name in natives.BUILDERS else None
    )


def _value(name: str) -> Meaning | None:
    if name in natives.CONSTANTS:
        return Meaning(NameUse.VALUE, natives.CONSTANTS[name])
    function = held_function(name)
    return Meaning(NameUse.FUNCTION, function) if function is not None else None


def _find(name: str) -> Any:
    """Import what an allowed name stands for."""
    module, _, attribute = name.rpartition(".")
    try:
        with current_folder_importable():
            return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise CheckpointError(
            f"needs {name}, which cannot be imported: {one_line(error)}{how_to_install(error)}"
        ) from error
