"""Pickle a model so that the safe loader can open it again.

module                    as Python pickles it: its class by name, its state
GraphModule               `SavedGraph`
edited forward            `SavedForward`: the class that it extends, and the graph
parametrized module       `SavedParametrized`
lambda, local class       refused, by the name of the attribute that holds it
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rewrite.checkpoint.graph_format import (
    SavedForward,
    SavedGraph,
    SavedParametrized,
    describe_forward,
    describe_graph_module,
    describe_parametrized,
)
from rewrite.errors import CheckpointError
from rewrite.nn.edited import EditedForward


class Pickler(pickle.Pickler):
    """The pickler that `torch.save` extends."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how to write `obj` where Python's own way cannot be read back."""
        if isinstance(obj, torch.fx.GraphModule):
            return SavedGraph, (), describe_graph_module(obj)
        if isinstance(obj, EditedForward):
            return SavedForward, (), describe_forward(obj)  # type: ignore[arg-type]  # its graph is an fx.Graph, which nn.Module does not say
        if isinstance(obj, nn.Module) and is_parametrized(obj):
            return SavedParametrized, (), describe_parametrized(obj)
        if isinstance(obj, type | FunctionType) and not _importable(obj):
            raise _NotImportableError(obj)
        if isinstance(obj, MethodType):
            raise _NotImportableError(obj)
        return NotImplemented


class _NotImportableError(Exception):
    """An object that a file could only hold by a name, and that has none."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def write_model(model: nn.Module, path: Path) -> None:
    """Write `model` to `path` with `torch.save`; raise CheckpointError for what cannot be held.

    Raises:
        OSError: The system does not take the file.
    """
    how = SimpleNamespace(__name__="pickle", Pickler=Pickler)
    try:
        with path.open("wb") as stream:
            torch.save(model, stream, pickle_module=how)
    except _NotImportableError as error:
        raise CheckpointError(_refusal(model, error.value)) from None
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the model cannot be pickled: {error}") from error
    except RuntimeError as error:
        # The archive writer fails once more while it closes, over what the system said.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        if isinstance(error.__context__, _NotImportableError):
            raise CheckpointError(_refusal(model, error.__context__.value)) from None
        message = str(error).splitlines()[0]
        raise CheckpointError(f"the model cannot be written: {message}") from error


def _importable(value: type | FunctionType) -> bool:
    """Say whether a class or function is found again under its own name."""
    if value is type(None):
        return True
    found = sys.modules.get(value.__module__)
    return getattr(found, value.__qualname__, None) is value


def _refusal(model: nn.Module, value: Any) -> str:
    """Say what cannot be written, where the model holds it, and what to do."""
    name = getattr(value, "__qualname__", type(value).__name__)
    kind = "the class" if isinstance(value, type) else "the function"
    if isinstance(value, MethodType):
        kind = "the method"
    place = next(_holders(model, value), None)
    where = f"{place}: holds" if place else "the model holds"
    return (
        f"{where} {kind} {name}, which no file can refer to by name; define it at the top level "
        "of a module, or save the state dict"
    )


def _holders(model: nn.Module, value: Any) -> Iterator[str]:
    """Yield the qualified names of the attributes under which a model holds `value`."""
    for name, module in model.named_modules():
        if type(module) is value:
            yield name or "the model"
        for key, held in vars(module).items():
            inside: Any = held.values() if isinstance(held, Mapping) else held
            if held is value or (
                isinstance(inside, list | tuple | type({}.values()))
                and any(item is value for item in inside)
            ):
                yield f"{name}.{key}" if name else key
