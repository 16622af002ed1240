"""An input for a model that comes without any: tried on fake runs until one fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from rewrite.errors import one_line
from rewrite.runtime.configured.maker import configured_inputs
from rewrite.runtime.inputs import Inputs, call, device_of, dtype_of
from rewrite.runtime.trial import trial

_FULL_SIZE = 224


_SIZES = (64, 128, 224, 256, 299, 384, 512)


_SAMPLES = 4000


ExampleInputs = tuple[Any, ...] | dict[str, Any]
"""Positional inputs, or keywords."""


@dataclass(frozen=True)
class Inferred:
    """What was found for a model that came without an input.

    Attributes:
        inputs: positional inputs, or keywords; None where the model refuses all that were tried.
        refusals: what it said to those that it refused before, one line each.
    """

    inputs: ExampleInputs | None
    refusals: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """Say that no input is known, and what the model said to the first that was tried."""
        if not self.refusals:
            return "no input is known"
        others = len(self.refusals) - 1
        more = f" (and refuses {others} more)" if others else ""
        return f"no input is known: {self.refusals[0]}{more}"


def infer_inputs(model: nn.Module, seed: int = 0, quick: bool = False) -> Inferred:
    """Return inputs that `model` runs on, and what it said to those that it refused.

    Read off, in order: what the configuration and the forward of a transformers model take, the
    input size that timm records in the model, the channels of the first convolution, the features
    of the first linear layer, the entries of the first embedding. Every candidate is tried by
    running a copy of the model; `quick` tries small images first.
    """
    generator = torch.Generator().manual_seed(seed)
    refusals = []
    device = device_of(model)
    others = ((candidate(generator).to(device),) for candidate in _candidates(model, quick))
    tried: Iterator[ExampleInputs] = chain(configured_inputs(model, generator), others)
    for given in tried:
        inputs = Inputs.of(given)
        with trial(model) as copied:
            try:
                call(copied, inputs.clone())
            except Exception as error:  # noqa: BLE001 - a forward may raise anything
                names = f"{' and '.join(inputs.kwargs)} " if inputs.kwargs else ""
                refusals.append(f"given {names}{inputs}, the model says: {one_line(error)}")
                continue
        return Inferred(given, tuple(refusals))
    return Inferred(None, tuple(refusals))


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

    recorded = recorded_size(model)
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


def recorded_size(model: nn.Module) -> tuple[int, ...] | None:
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
