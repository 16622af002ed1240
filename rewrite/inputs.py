"""Inputs that find errors, and inputs for a model that comes without any.

An equality that holds on one random batch may fail on another: zeros hide biases, one scale hides
eps, batch size 1 hides a mixed-up batch axis, one spatial size hides a baked-in shape. The cases
made here vary one thing at a time:

    value   normal x {1, 0.1, 10}, uniform, zeros, ones, tiny (1e-6), large (1e3), one impulse
    batch   1, 2, 7
    space   another height and width, where the model takes it
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from rewrite.compare import tensors
from rewrite.errors import RewriteError, VerificationError, system_reason
from rewrite.float64 import evaluating, isolated

BATCH_SIZES = (1, 2, 7)
QUICK_SIZE = 64
_FULL_SIZE = 224
_SIZES = (64, 128, 224, 256, 299, 384, 512)
_SAMPLES = 4000
_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal x 0.1": lambda noise: 0.1 * noise,
    "normal x 10": lambda noise: 10 * noise,
    "uniform": lambda noise: (noise.abs() / 3).clamp(max=1),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "tiny": lambda noise: 1e-6 * noise,
    "large": lambda noise: 1e3 * noise,
    "impulse": lambda noise: _impulse(noise),
}


@dataclass(frozen=True)
class Inputs:
    """What one call of a model gets."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Read a batch: a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        if isinstance(batch, list | tuple):
            return cls(tuple(batch))
        return cls((batch,))

    def map(self, function: Callable[[Any], Any]) -> Inputs:
        """Return these inputs with `function` applied to every leaf of nested containers."""
        return Inputs(tree_map(function, self.args), tree_map(function, dict(self.kwargs)))

    def to(self, device: torch.device) -> Inputs:
        """Return these inputs with every tensor on `device`."""
        return self.map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf)

    def clone(self) -> Inputs:
        """Return these inputs with tensors that a forward may write into."""
        return self.map(
            lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        )

    def __str__(self) -> str:
        shapes = [_shape_text(t) for t in tensors([self.args, dict(self.kwargs)])]
        return ", ".join(shapes) or "no tensors"


def _shape_text(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def batches_for(model: nn.Module, batch: Any) -> Inputs:
    """Return what of a batch goes into `model`: loaders yield labels beside the inputs.

    Positional values beyond what the forward takes are left out.
    """
    inputs = Inputs.of(batch)
    limit = _positional_limit(model)
    return Inputs(inputs.args[:limit], inputs.kwargs)


def _positional_limit(model: nn.Module) -> int | None:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        # A forward implemented in C++ has no signature: take the batch as it is.
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of the first floating-point parameter, or float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def adversarial(inputs: Inputs, seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """Yield named variations of `inputs`: of value, of batch size, of spatial size.

    Values are varied at batch size 1, so that a large example does not make them dear. A variation
    that a model refuses is the caller's to leave out.
    """
    generator = torch.Generator().manual_seed(seed)
    single = with_batch(inputs, 1, generator) or inputs
    floating = any(t.is_floating_point() for t in tensors([inputs.args, dict(inputs.kwargs)]))
    for name, values in _VALUES.items() if floating else ():
        yield name, single.map(partial(_revalued, values=values, generator=generator))
    if not floating:
        yield "other indices", single.map(lambda leaf: _shuffled(leaf, generator))
    for size in BATCH_SIZES:
        varied = with_batch(inputs, size, generator)
        if varied is not None:
            yield f"batch of {size}", varied
    for name, scale in (("smaller", 0.5), ("larger", 1.5)):
        resized = _with_space(single, scale, generator)
        if resized is not None:
            yield f"{name} ({resized})", resized


def _impulse(noise: torch.Tensor) -> torch.Tensor:
    """Return zeros with a single one off the center: tells axes, flips and paddings apart."""
    value = torch.zeros_like(noise)
    if value.numel():
        value.view(-1)[value.numel() // 3] = 1
    return value


def _noise(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _revalued(
    leaf: Any, *, values: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return values(_noise(tuple(leaf.shape), leaf, generator).contiguous())


def _shuffled(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.dtype not in (torch.int64, torch.int32):
        return leaf
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return leaf.reshape(-1)[order].view(leaf.shape)


def _batched(inputs: Inputs) -> int | None:
    """Return the size of the first axis if all tensors agree on it."""
    sizes = {t.shape[0] if t.ndim else None for t in tensors([inputs.args, dict(inputs.kwargs)])}
    return sizes.pop() if len(sizes) == 1 else None


def with_batch(inputs: Inputs, size: int, generator: torch.Generator) -> Inputs | None:
    """Return random inputs of another batch size, or None where there is no batch axis."""
    if not _batched(inputs):
        return None
    return inputs.map(
        lambda leaf: (
            _resized(leaf, (size, *leaf.shape[1:]), generator)
            if isinstance(leaf, torch.Tensor)
            else leaf
        )
    )


def _with_space(inputs: Inputs, scale: float, generator: torch.Generator) -> Inputs | None:
    """Scale the two last axes of every image, in steps of 32 where the example is in them."""

    def side(length: int) -> int:
        step = 32 if length % 32 == 0 else 1
        return max(step, round(length * scale / step) * step)

    def varied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim != 4 or not leaf.is_floating_point():
            return leaf
        return _resized(leaf, (*leaf.shape[:2], *map(side, leaf.shape[2:])), generator)

    resized = inputs.map(varied)
    return None if str(resized) == str(inputs) else resized


def _resized(
    leaf: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    if leaf.is_floating_point():
        return _noise(shape, leaf, generator)
    repeats = -(-shape[0] // max(1, leaf.shape[0]))
    return leaf.repeat(repeats, *(1 for _ in shape[1:]))[: shape[0]].clone()


def infer_example_inputs(
    model: nn.Module, seed: int = 0, quick: bool = False
) -> tuple[Any, ...] | None:
    """Return positional inputs that `model` runs on, or None if none was found.

    Read off, in order: the input size that timm or transformers record in the model, the channels
    of the first convolution, the features of the first linear layer, the entries of the first
    embedding. Every candidate is tried by running the model; `quick` tries small images first.
    """
    generator = torch.Generator().manual_seed(seed)
    for candidate in _candidates(model, quick):
        value = candidate(generator).to(device_of(model))
        with contextlib.suppress(Exception), evaluating(model), isolated(model):
            call(model, Inputs((value,)))
            return (value,)
    return None


def call(model: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
    """Run `model` without gradients, with the random state seeded and put back."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        return model(*inputs.args, **inputs.kwargs)


def _candidates(
    model: nn.Module, quick: bool
) -> Iterator[Callable[[torch.Generator], torch.Tensor]]:
    dtype = dtype_of(model)

    def floats(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
        return lambda generator: torch.randn(shape, generator=generator).to(dtype)

    recorded = _recorded_size(model)
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and not isinstance(
            layer, nn.modules.conv._ConvTransposeNd
        ):
            dims = len(layer.kernel_size)
            if dims == 2:
                if recorded is not None and not quick:
                    yield floats(1, *recorded)
                sizes = _SIZES if quick else (_FULL_SIZE, *_SIZES)
                for size in sizes:
                    yield floats(1, layer.in_channels, size, size)
                if recorded is not None and quick:
                    yield floats(1, *recorded)
                for size in (32, 28, 16, 8):
                    yield floats(1, layer.in_channels, size, size)
            elif dims == 1:
                for length in (256, _SAMPLES, 16000):
                    yield floats(1, layer.in_channels, length)
            else:
                for length in (16, 32, 64):
                    yield floats(1, layer.in_channels, 16, length, length)
            break
        if isinstance(layer, nn.Linear):
            yield floats(2, layer.in_features)
            yield floats(1, 8, layer.in_features)
            break
        if isinstance(layer, nn.Embedding):
            yield partial(_indices, layer.num_embeddings)
            break
        if isinstance(layer, nn.RNNBase):
            yield floats(4, 2, layer.input_size)
            break
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            features = layer.num_features
            yield floats(2, features)
            yield floats(1, features, 16)
            yield floats(1, features, 16, 16)
            break


def _indices(entries: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, entries, (1, 16), generator=generator)


def _recorded_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return (channels, height, width) as timm or transformers note them in the model."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            return tuple(config["input_size"])
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(size, int) and isinstance(channels, int):
        return (channels, size, size)
    return None


def parse_shapes(text: str, model: nn.Module | None = None, seed: int = 0) -> tuple[Any, ...]:
    """Read "1x3x224x224" or "1x16:int64,1x3x8x8" into random inputs.

    Raises:
        VerificationError: the text is not a list of shapes.
    """
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


def load_inputs(path: str) -> tuple[Any, ...]:
    """Read inputs from a file of numpy (.npy, .npz) or PyTorch (.pt, tensors only).

    Raises:
        VerificationError: the file cannot be read, or holds no tensors.
    """
    import numpy as np

    try:
        if path.endswith(".npy"):
            return (torch.from_numpy(np.load(path, allow_pickle=False)),)
        if path.endswith(".npz"):
            # numpy leaves a file open that it opened and cannot read.
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                return tuple(torch.from_numpy(archive[name]) for name in archive.files)
        loaded = torch.load(path, weights_only=True, map_location="cpu")
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


def one_line(error: BaseException) -> str:
    """Return the first line of an error, with the next where it announces one, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
