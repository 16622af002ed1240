"""Inputs from text (`1x3x224x224`) and from files (`.npz`, `.npy`, `.pt`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError, VerificationError, one_line, system_reason
from rewrite.files import no_file
from rewrite.runtime.inputs import device_of, dtype_of, positional_limit
from rewrite.runtime.leaves import tensors
from rewrite.runtime.stored.array_files import read_arrays


def parse_shapes(text: str, model: nn.Module | None = None, seed: int = 0) -> tuple[Any, ...]:
    """Read "1x3x224x224" or "1x16:int64,1x3x8x8" into random inputs.

    Raises:
        VerificationError: the text is not a list of shapes, or has more than the model takes.
    """
    numbers = text.split(",")
    taken = None if model is None else positional_limit(model)
    if taken is not None and len(numbers) > taken and all(n.strip().isdigit() for n in numbers):
        raise VerificationError(
            f"--input {text}: commas stand between inputs, these are {len(numbers)}, and the model "
            f"takes {taken}; write one as {'x'.join(n.strip() for n in numbers)}"
        )
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cpu") if model is None else device_of(model)
    default = torch.float32 if model is None else dtype_of(model)
    return tuple(_from_text(part, default, generator).to(device) for part in text.split(","))


def _from_text(text: str, default: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    shape_text, _, kind = text.strip().partition(":")
    dtype = getattr(torch, kind, None) if kind else default
    try:
        shape = tuple(int(part) for part in shape_text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or not isinstance(dtype, torch.dtype) or min(shape) < 1:
        raise VerificationError(
            f"--input {text}: not a shape; write it as 1x3x224x224, or 1x16:int64 for integers"
        )
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(dtype)
        if dtype is torch.bool:
            return torch.randint(0, 2, shape, generator=generator).bool()
        return torch.randint(0, 10, shape, generator=generator).to(dtype)
    except (RuntimeError, MemoryError, ValueError) as error:
        raise VerificationError(
            f"--input {text}: cannot be made, give a smaller shape: {one_line(error)}"
        ) from error


def _read_tensors(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def load_inputs(path: str, read: Callable[[Path], Any] = _read_tensors) -> tuple[Any, ...]:
    """Read inputs from a file of numpy (.npy, .npz) or PyTorch (.pt, opened by `read`).

    Raises:
        VerificationError: the file cannot be read, or holds no tensors.
    """
    if path.endswith((".npy", ".npz")):
        return tuple(load_named_inputs(path).values())
    if wrong := no_file(path):
        raise VerificationError(f"{path}: {wrong}")
    try:
        loaded = read(Path(path))
    except RewriteError:
        raise
    except OSError as error:
        raise VerificationError(f"{path}: {system_reason(error)}") from error
    except Exception as error:
        raise VerificationError(f"{path}: cannot be read as inputs: {one_line(error)}") from error
    if isinstance(loaded, torch.Tensor):
        return (loaded,)
    if isinstance(loaded, list | tuple) and tensors(loaded):
        return tuple(loaded)
    raise VerificationError(f"{path}: holds no tensors; save a tensor or a tuple of tensors")


def load_named_inputs(path: str) -> dict[str, torch.Tensor]:
    """Read the arrays of a numpy file by their names; that of a .npy file is called "".

    Raises:
        VerificationError: the file cannot be read, or holds something else.
    """
    try:
        return dict(read_arrays(Path(path)))
    except OSError as error:
        raise VerificationError(f"{path}: {system_reason(error)}") from error
    except (ValueError, TypeError, MemoryError, SyntaxError) as error:
        raise VerificationError(f"{path}: cannot be read as inputs: {one_line(error)}") from error
