"""A call of text with an image in it, for models that put an image's features in place of tokens.

ids = text, image token × n, text        n = number of vectors that `get_image_features` returns

Such a model runs its vision tower only where it is given pixels; a call of text alone leaves its
norms unseen, and the code that merges both streams on lines that no call took.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.runtime.inputs import device_of, dtype_of
from rewrite.runtime.leaves import tensors

_BEFORE = 4


def images_in_text(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Iterator[Any]:
    """Yield keywords of calls with one image in the text, one for each way to give its pixels.

    Args:
        model: in eval mode; its `get_image_features` is run, and nothing else of it.
        ids: the text, (1, length), int64.
        generator: draws the pixels.
    """
    config: Any = getattr(model, "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    features = getattr(model, "get_image_features", None)
    vision = getattr(config, "vision_config", None)
    if not isinstance(token, int) or features is None or vision is None:
        return
    for pixels in _pixels(vision, generator):
        given = {key: _placed(value, model) for key, value in pixels.items()}
        try:
            with torch.no_grad():
                count = _vectors(features(**given))
        except Exception:  # noqa: BLE001 - what a model refuses is not one of its calls
            continue
        image = torch.full((1, count), token, dtype=ids.dtype, device=ids.device)
        whole = torch.cat([ids[:, :_BEFORE], image, ids[:, _BEFORE:]], dim=1)
        kinds = {"mm_token_type_ids": (whole == token).long()} if "image_grid_thw" in given else {}
        yield {"input_ids": whole, **given, **kinds}


def _pixels(vision: Any, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield an image as models take it: whole, one of several, or cut into patches with a grid."""
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    image = torch.randn(1, channels, height, width, generator=generator)
    merge, patch = getattr(vision, "spatial_merge_size", None), getattr(vision, "patch_size", None)
    if isinstance(merge, int) and isinstance(patch, int):
        side = 2 * merge
        length = channels * getattr(vision, "temporal_patch_size", 1) * patch * patch
        patches = torch.randn(side * side, length, generator=generator)
        yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}
    yield {"pixel_values": image}
    yield {"pixel_values": image, "image_sizes": torch.tensor([[height, width]])}
    yield {"pixel_values": image[None]}


def _placed(value: Tensor, model: nn.Module) -> Tensor:
    dtype = dtype_of(model) if value.is_floating_point() else value.dtype
    return value.to(device_of(model), dtype)


def _vectors(features: Any) -> int:
    """Return how many vectors stand in place of tokens."""
    pooled = getattr(features, "pooler_output", None)
    found = tensors(features if pooled is None else pooled)
    return sum(tensor.numel() // tensor.shape[-1] for tensor in found)
