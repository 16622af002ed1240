"""Variations of a batch of images: flips, crops and colours that leave its meaning."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rewrite.runtime.inputs import Inputs


def variations(inputs: Inputs) -> Iterator[Inputs]:
    """Yield two variations of a batch of images; none of anything else.

    In the first, colours change places, brightness and contrast change, some are mirrored top to
    bottom, some are negatives. In the second, each is half one sample of the first, half another.
    What happens to a batch depends on that batch alone, so that ranks agree with one process.
    """
    if len(inputs.args) != 1 or inputs.kwargs or not _is_image_batch(inputs.args[0]):
        return
    images: Tensor = inputs.args[0]
    values = images.detach().float().cpu().contiguous().numpy()
    generator = torch.Generator().manual_seed(zlib.crc32(values.tobytes()))
    recoloured = torch.stack([_recoloured(image, generator) for image in images])
    yield Inputs((recoloured,))
    other = recoloured[torch.randperm(len(images), generator=generator).to(images.device)]
    half = images.shape[3] // 2
    yield Inputs((torch.cat([recoloured[..., :half], other[..., half:]], dim=3),))


def _is_image_batch(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 4:
        return False
    return value.shape[1] in (1, 3) and min(value.shape[2:]) >= 4


def _recoloured(image: Tensor, generator: torch.Generator) -> Tensor:
    kind = int(torch.randint(4, (), generator=generator))
    order = torch.randperm(len(image), generator=generator).to(image.device)
    if kind == 0:
        image = image.flip(1)
    elif kind in (1, 2):
        image = image[order]
    contrast = 0.5 + float(torch.rand((), generator=generator))
    colour = 0.3 * torch.randn(len(image), 1, 1, generator=generator)
    changed = image * contrast + colour.to(image)
    return -changed if kind == 3 else changed
