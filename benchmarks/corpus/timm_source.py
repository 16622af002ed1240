"""timm: every registered architecture, without pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn


def architectures() -> Iterator[str]:
    """Yield every model name of timm."""
    yield from timm.list_models()


def make(architecture: str) -> nn.Module:
    """Build one model with random weights."""
    return timm.create_model(architecture, pretrained=False)


def candidates(architecture: str, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield image batches from small to the size that the model was made for."""
    config: dict[str, Any] = getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    sizes = [(height, width)]
    if not config.get("fixed_input_size"):
        sizes = [(side, side) for side in (64, 128) if side < height] + sizes
    for size in sizes:
        yield (torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0)),)
