"""pytorchcv: every model of its provider, without pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pytorchcv import model_provider
from torch import nn

_SHAPES: dict[str, tuple[Any, ...]] = {
    "pfpcnet": ((1, 1, 320, 240),),
    "raft_things": ((1, 3, 128, 128), torch.zeros(1, 3, 128, 128)),
    "visemenet20": ((100, 8, 195), torch.full((100, 76), 3)),
    "voca8flame": ((1, 1, 16, 29), torch.full((1,), 3)),
}
"""What models take that look at more than one image of three channels."""


def architectures() -> Iterator[str]:
    """Yield every model name of the provider."""
    yield from sorted(model_provider._models)


def make(architecture: str) -> nn.Module:
    """Build one model with random weights; speech models without their own spectrogram.

    That spectrogram calls `torch.stft` in a form that PyTorch no longer accepts.
    """
    speech = architecture.startswith(("jasper", "quartznet"))
    options = {"from_audio": False} if speech else {}
    return model_provider.get_model(architecture, pretrained=False, **options)


def candidates(architecture: str, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield inputs from small to the size that the model was made for; speech models take mels."""
    generator = torch.Generator().manual_seed(0)
    if architecture in _SHAPES:
        image, *others = _SHAPES[architecture]
        yield (torch.rand(image, generator=generator), *(other.clone() for other in others))
        return
    channels, made_for = getattr(model, "in_channels", 3), getattr(model, "in_size", (224, 224))
    if isinstance(made_for, int):
        yield torch.rand(1, made_for, 64, generator=generator), torch.tensor([64])
        return
    small = [(side, side) for side in (64, 128) if side < made_for[0]]
    for size in [*small, made_for]:
        yield (torch.rand(1, channels, *size, generator=generator),)
