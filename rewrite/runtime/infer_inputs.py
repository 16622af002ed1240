"""An input for a model that comes without any: tried on fake runs until one fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from rewrite.runtime.inputs import Inputs, call, device_of, dtype_of
from rewrite.runtime.modes import evaluating, isolated

_FULL_SIZE = 224


_SIZES = (64, 128, 224, 256, 299, 384, 512)


_SAMPLES = 4000


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


def has_certain_rank(model: nn.Module) -> bool:
    """Return whether the first layer says how many axes an inferred input has to have.

    A linear layer and a batch norm of vectors take inputs of several ranks, and what follows may
    mean another thing on each: Linear → BatchNorm1d on (N, C) and on (N, C, L) with C = L.
    """
    certain = (nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase)
    ambiguous = (nn.Linear, nn.modules.batchnorm._BatchNorm)
    layers = (m for m in model.modules() if isinstance(m, (*certain, *ambiguous)))
    return not isinstance(next(layers, None), ambiguous)


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
