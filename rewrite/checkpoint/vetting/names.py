"""Judge a name from a file as text: may it be looked up at all?

    name -> may be asked for | CheckpointError         nothing is imported to find that out

`allowed_values.json` holds the names of which this package makes a value itself (tensors, plain
values, what `rewrite.save` writes), and those of the methods that every module has; it comes from
`python -m benchmarks.allowed_classes`, as the lists of classes and of operators do. A function of
PyTorch that passes here is looked up later, and judged once more by what it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

from rewrite.checkpoint.allowed_classes import MOVED, TRUSTED, standing
from rewrite.errors import CheckpointError


@cache
def listed(kind: str) -> frozenset[str]:
    """Return one of the lists of `allowed_operators.json`."""
    text = (
        resources.files("rewrite.checkpoint").joinpath("allowed_operators.json").read_text("utf-8")
    )
    return frozenset(json.loads(text)["names"][kind].split())


@cache
def values(kind: str = "values") -> frozenset[str]:
    """Return the names of what the reader of pickles makes itself, or the "methods" of a module."""
    text = resources.files("rewrite.checkpoint").joinpath("allowed_values.json").read_text("utf-8")
    return frozenset(json.loads(text)["names"][kind].split())


_SPELLINGS = {
    "torch._C._nn": "torch.nn.functional",
    "torch._C._VariableFunctions": "torch",
    "torch._C._VariableFunctionsClass": "torch",
    "torch._C.TensorBase": "torch.Tensor",
    "torch._tensor.Tensor": "torch.Tensor",
    "torch.functional": "torch",
}
"""Where torch keeps the functions that it has under a public name."""

FUNCTION_PLACES = (
    "torch._C._VariableFunctionsClass",
    "torch._C.TensorBase",
    "torch._tensor.Tensor",
)
"""Classes of which Python pickles a function as `getattr(class, name)`."""

_PREFIXED = {"torch._C._fft": "fft", "torch._C._linalg": "linalg", "torch._C._special": "special"}


def public_name(name: str) -> str:
    """Return the public name of a function of torch: torch._C._fft.fft_rfft2 is torch.fft.rfft2."""
    place, _, last = name.rpartition(".")
    if place in _PREFIXED:
        kind = _PREFIXED[place]
        return f"torch.{kind}.{last.removeprefix(f'{kind}_')}"
    return f"{_SPELLINGS.get(place, place)}.{last}"


_NEVER = frozenset(
    {
        *("builtins", "os", "posix", "nt", "sys", "subprocess", "shutil", "importlib", "pickle"),
        *("ctypes", "socket", "runpy", "code", "codeop", "marshal", "shelve", "urllib", "http"),
        *("tempfile", "signal", "inspect", "operator", "_operator", "multiprocessing", "threading"),
        *("pty", "platform", "webbrowser", "pydoc", "timeit", "cProfile", "profile", "pdb", "bdb"),
        *("asyncio", "io", "_io", "_pyio", "zipfile", "tarfile", "mmap", "logging", "linecache"),
        *("ftplib", "smtplib", "fileinput", "glob", "gc", "venv", "ensurepip", "pip", "setuptools"),
    }
)
"""Packages of Python of which no model needs a class or a function."""


_WHOLE = frozenset({"torch.nn.functional", "torch.nn.init", "_operator", "math"})
"""Places whose functions are listed by what this version of them holds."""

_LISTED = {
    **{place: place for place in ("torch", "torch.fft", "torch.linalg", "torch.special")},
    "torch.Tensor": "methods",
}
TORCHVISION_HELD = frozenset(
    {"torchvision.ops.boxes.box_iou", "torchvision.models.optical_flow.raft._pass_through_h"}
)
"""Functions of torchvision that its models keep as attributes; each only computes on tensors."""


def may_have_meaning(name: str) -> bool:
    """Say whether a name is a value, or a function that a module may keep."""
    if name in values() or name in TORCHVISION_HELD:
        return True
    place, _, last = public_name(name).rpartition(".")
    return place in _WHOLE or (place in _LISTED and last in listed(_LISTED[place]))


def refuse_unless_allowed(
    name: str, trust: Sequence[str], has_meaning: Callable[[str], bool] = may_have_meaning
) -> None:
    """Raise CheckpointError for a name that nobody allowed; import nothing.

    Args:
        name: The full name.
        trust: Packages and full names that are allowed beside the lists.
        has_meaning: Says of a name whether it stands for a value or a function of the lists.
    """
    if has_meaning(name):
        return
    package = name.partition(".")[0]
    if package in _NEVER:
        raise CheckpointError(f"names {name}, which no model needs and no --trust allows")
    if name in trust or package in trust or standing(MOVED.get(name, name)) is not None:
        return
    if name.startswith("torch.fx."):
        raise CheckpointError(
            f"names {name}, a pickled GraphModule, which holds source code; write it with "
            "rewrite.save"
        )
    if package in TRUSTED:
        raise CheckpointError(
            f"names {name}, which is on no list of layers; "
            f"pass --trust {name} if you know where the file comes from"
        )
    raise CheckpointError(
        f"names {name}, and package {package!r} is not trusted; "
        f"pass --trust {package} if you know where the file comes from"
    )
