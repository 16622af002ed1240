"""Open a pickled checkpoint without running foreign code.

    names  = get_unsafe_globals_in_checkpoint(file)       what does the file ask for?
    trial  = load(file, every name -> a stand-in)         what would it do with each?
    object = load(file, every name -> the real thing)     only when all of it was allowed

Every load is `torch.load(weights_only=True)`. In the trial no name of the file means anything:
each is a stand-in that judges how it is used, and the tensors stay on the disk. A class may be
instantiated empty and given its state, as pickle does with modules; it may not be *called*, since
a constructor does whatever its arguments say. Importing a module runs it, so a name is looked up
only inside a package that is trusted.
"""

from __future__ import annotations

import argparse
import enum
import functools
import importlib
import pickle
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rewrite.checkpoint.graph_format import SavedForward, SavedGraph, SavedParametrized
from rewrite.errors import CheckpointError

TRUSTED = ("torch", "torchvision", "timm", "transformers", "rewrite")
"""Packages whose module classes a checkpoint may name without `--trust`."""


_LAYERS_OF_TORCH = ("torch.nn.", "torch.ao.nn.")
"""Where torch keeps its layers; torch.fx, torch.jit and others turn data into code."""


_CONTAINERS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "builtins.frozenset": frozenset,
    "builtins.slice": slice,
    "builtins.range": range,
    "functools.partial": functools.partial,
}
"""Plain data that checkpoints hold beside modules; building one runs nothing."""


_MEMBER = "builtins.getattr"
"""How Python 3.11.0 to 3.11.3 pickle a member of an Enum: `getattr(cls, name)`. Nothing else of it
is allowed."""


_SAVED = {
    "rewrite.checkpoint.SavedForward": SavedForward,
    "rewrite.checkpoint.SavedGraph": SavedGraph,
    "rewrite.checkpoint.SavedParametrized": SavedParametrized,
    "rewrite.graphfile.SavedGraph": SavedGraph,
    "rewrite.graphfile.SavedParametrized": SavedParametrized,
}
"""What `rewrite.save` writes for modules that cannot be pickled, and wrote until 0.1.0."""

_MOVED = {
    "rewrite.mean_only.MeanOnlyBatchNorm": "rewrite.nn.MeanOnlyBatchNorm",
    "rewrite.modules.ChannelAffine": "rewrite.nn.ChannelAffine",
    "rewrite.modules.ChannelLayerNorm": "rewrite.nn.ChannelLayerNorm",
    "rewrite.modules.ChannelMix": "rewrite.nn.ChannelMix",
    "rewrite.parametrizations.WeightNorm": "rewrite.nn.WeightNorm",
}
"""How files of 0.1.0 name the classes of this toolkit, and what that is today."""


_PLAIN_CLASSES = frozenset(
    {
        "torch.nn.modules.module._WrappedHook",
        "torch.nn.utils.weight_norm.WeightNorm",
        "torch.nn.utils.spectral_norm.SpectralNorm",
        "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
        "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
    }
)
"""Classes that are no modules, but that modules of the trusted packages keep as attributes."""


_ACTIVATIONS = (
    "celu",
    "elu",
    "gelu",
    "glu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "log_sigmoid",
    "mish",
    "normalize",
    "prelu",
    "relu",
    "relu6",
    "relu_",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
)


_FUNCTIONS = frozenset(
    {"torchvision.ops.boxes.box_iou", "torchvision.models.optical_flow.raft._pass_through_h"}
) | frozenset(
    f"{place}.{name}"
    for place in ("torch", "torch.nn.functional", "torch._C._nn", "torch._C._VariableFunctions")
    for name in _ACTIVATIONS
)
"""Functions that a module may keep as an attribute: each only computes on tensors."""


@dataclass(frozen=True)
class _Grant:
    """What a name of the file stands for, and what the file may do with it."""

    value: Any
    instantiated: bool = False
    called: bool = False
    held: bool = True


def load_pickle(
    path: Path,
    *,
    trust: Sequence[str] = (),
    map_location: str | torch.device = "cpu",
) -> Any:
    """Return the object of a `torch.save` file; raise CheckpointError for what may not be opened.

    Args:
        path: A file written by `torch.save`.
        trust: Packages, or full names of single classes and functions, allowed beside `TRUSTED`.
        map_location: Where the tensors go. For the CPU they stay mapped from the file, where its
            format allows that.
    """
    zipped = zipfile.is_zipfile(path)
    names = _names(path) if zipped else []
    grants = {name: grant(name, trust, path) for name in names}
    if grants:
        _try_out(path, grants)
    real = [(entry.value, name) for name, entry in grants.items()]
    real += [(kind, f"<{name}>") for name, kind in _SAVED.items()]
    mapped = zipped and torch.device(map_location).type == "cpu"
    return _torch_load(path, real, map_location=map_location, mmap=mapped)


def _names(path: Path) -> list[str]:
    """Return the globals that a file asks for beside tensors and containers."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception as error:
        raise CheckpointError(f"{path}: is damaged ({_first_line(error)})") from error


def grant(name: str, trust: Sequence[str], path: Path) -> _Grant:
    """Look a global of a checkpoint up; raise CheckpointError when nobody allowed it."""
    if name in _CONTAINERS:
        return _Grant(_CONTAINERS[name], instantiated=True, called=True)
    if name in _SAVED:
        return _Grant(functools.partial(_SAVED[name], tuple(trust)), called=True, held=False)
    if name == _MEMBER:
        return _Grant(_member, called=True, held=False)
    package = name.partition(".")[0]
    if package in _NEVER:
        raise CheckpointError(f"{path}: names {name}, which no model needs and no --trust allows")
    if name not in trust and package not in {*TRUSTED, *(entry for entry in trust)}:
        raise CheckpointError(
            f"{path}: names {name}, and package {package!r} is not trusted; "
            f"pass --trust {package} if you know where the file comes from"
        )
    value = _find(name, path)
    if name in trust:
        return _Grant(value, instantiated=isinstance(value, type))
    if name in _FUNCTIONS:
        return _Grant(value)
    reason = _objection(name, value, trust)
    if reason is not None:
        raise CheckpointError(f"{path}: names {name}, {reason}")
    return _Grant(
        value,
        instantiated=True,
        called=issubclass(value, enum.Enum),
        held=package != "transformers" or issubclass(value, enum.Enum),
    )


def _member(kind: Any, name: Any) -> enum.Enum:
    """Return a member of an Enum; raise CheckpointError for any other attribute of anything."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise CheckpointError(f"names {_MEMBER}, which no model needs and no --trust allows")
    if name not in kind.__members__:
        raise CheckpointError(f"names {kind.__qualname__}.{name}, which is no member of that Enum")
    return kind[name]


_NEVER = frozenset({"builtins", "os", "posix", "nt", "sys", "subprocess", "shutil", "importlib"})


def _find(name: str, path: Path) -> Any:
    """Import what a name of a trusted package stands for."""
    module, _, attribute = _MOVED.get(name, name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise CheckpointError(f"{path}: needs {name}, which cannot be imported: {error}") from error


def _objection(name: str, value: Any, trust: Collection[str]) -> str | None:
    """Say why a global of a trusted package is refused all the same, or return None."""
    fix = f"pass --trust {name} to allow just that"
    if not isinstance(value, type):
        return f"a function; only classes are opened; {fix}"
    home = f"{value.__module__}.{value.__qualname__}"
    package = home.partition(".")[0]
    if package in trust:
        return None
    if package not in TRUSTED:
        return f"which is {home} of a package that is not trusted; pass --trust {package}"
    if issubclass(value, torch.fx.GraphModule):
        return "a pickled GraphModule, which holds source code; write it with rewrite.save"
    if package == "torch" and not home.startswith(_LAYERS_OF_TORCH):
        return f"which is no layer of torch.nn; {fix}"
    if issubclass(value, nn.Module | enum.Enum) or home in _PLAIN_CLASSES:
        return None
    bases = [base.__module__ for base in value.__mro__]
    if package == "transformers" and "transformers.configuration_utils" in bases:
        return None
    return f"which is no nn.Module class; {fix}"


class _Inert:
    """What a stand-in makes in the trial: an object that keeps nothing and does nothing."""

    def __setstate__(self, state: Any) -> None:
        """Take any state, if all that it holds may be held."""
        _check_held(state)


class _InertPartial(_Inert):
    """A `functools.partial` in the trial."""

    def __setstate__(self, state: Any) -> None:
        """Check the function that the state brings in, as the constructor did."""
        _check_partial(state[0] if isinstance(state, tuple) and state else None)
        _check_held(state)


class _StandIn:
    """What a name of the file means in the trial: nothing, but its use is judged."""

    def __init__(self, name: str, entry: _Grant) -> None:
        self.name = name
        self.entry = entry
        # The unpickler instantiates by `cls.__new__(cls, *args)`, found on this object.
        self.__dict__["__new__"] = self._instantiate

    def _instantiate(self, _: Any, *args: Any) -> _Inert:
        if not self.entry.instantiated or args:
            raise CheckpointError(f"instantiates {self.name} with arguments of its own")
        return _Inert()

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        if not self.entry.called:
            raise CheckpointError(
                f"calls {self.name}, which could run anything; a pickled model only holds it"
            )
        if self.name == _MEMBER:
            kind, name = args if len(args) == 2 else (None, None)
            _member(kind.entry.value if isinstance(kind, _StandIn) else None, name)
            return _Inert()
        _check_held(args)
        if self.name == "functools.partial":
            _check_partial(args[0] if args else None)
            return _InertPartial()
        return _Inert()


def _check_held(state: Any) -> None:
    """Raise CheckpointError for a name kept as a value where somebody might call it."""
    waiting, seen = [state], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _StandIn) and not value.entry.held:
            raise CheckpointError(f"keeps {value.name} as a value, where a model holds instances")
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)


def _check_partial(function: Any) -> None:
    """Raise CheckpointError unless `function` is a class or function harmless with any argument."""
    if not isinstance(function, _StandIn):
        raise CheckpointError("holds a functools.partial of something that is no allowed name")
    if function.entry.called or not function.entry.held:
        raise CheckpointError(f"holds a functools.partial of {function.name}")


def _try_out(path: Path, grants: dict[str, _Grant]) -> None:
    """Load `path` with a stand-in for each name and its tensors left on the disk."""
    stand_ins: list[tuple[Any, str]] = [(_StandIn(n, entry), n) for n, entry in grants.items()]
    # The unpickler gives state only to objects of listed classes; no file can spell these names.
    kinds = [(_Inert, "<inert>"), (_InertPartial, "<inert partial>")]
    _torch_load(path, stand_ins + kinds, map_location="meta", mmap=False)


def _torch_load(
    path: Path,
    allowed: list[tuple[Any, str]],
    *,
    map_location: str | torch.device,
    mmap: bool,
) -> Any:
    """Call `torch.load(weights_only=True)`; raise CheckpointError for whatever goes wrong in it."""
    try:
        with safe_globals([*allowed]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_first_line(error)}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return what an unpickling error says in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if "WeightsUnpickler error:" in line:
            said = line.partition("WeightsUnpickler error:")[2].strip()
            # An empty stack has nothing to say: bytes that are no pickle.
            return said or "is no checkpoint, or a damaged one"
    return lines[0] if lines else type(error).__name__
