"""segmentation-models-pytorch: Unet over every encoder, every decoder over four encoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import get_encoder_names
from torch import nn

_DECODERS = (
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "fpn",
    "pspnet",
    "pan",
    "deeplabv3",
    "deeplabv3plus",
    "upernet",
    "segformer",
    "dpt",
)
_ENCODERS = ("resnet18", "timm-efficientnet-b0", "tu-mobilenetv3_small_050", "mit_b0")
_DPT_ENCODER = "tu-vit_tiny_patch16_224"


def architectures() -> Iterator[str]:
    """Yield `decoder/encoder` names."""
    for encoder in _ENCODERS:
        for decoder in _DECODERS:
            if decoder != "dpt":
                yield f"{decoder}/{encoder}"
    yield f"dpt/{_DPT_ENCODER}"
    for encoder in get_encoder_names():
        if encoder not in _ENCODERS:
            yield f"unet/{encoder}"


def make(architecture: str) -> nn.Module:
    """Build one segmentation model with random weights."""
    decoder, _, encoder = architecture.partition("/")
    return smp.create_model(decoder, encoder_name=encoder, encoder_weights=None, classes=2)


def candidates(architecture: str, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield image batches from small to large."""
    for side in (64, 128, 224):
        yield (torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)),)
