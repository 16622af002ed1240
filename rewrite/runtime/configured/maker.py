"""What a model of transformers is called with: its configuration tells sizes, its forward names.

input_ids < vocab_size     pixel_values (n, channels, size, size)     decoder_input_ids beside
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rewrite.runtime.inputs import device_of, dtype_of

_LENGTH = 8
_VOCABULARY = 64
_MARKS = re.compile(r"(image|video|audio|vision)\w*_token(_id|_index)$")


def configured_inputs(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Yield inputs of one sample for a transformers model: one kind, then text and images.

    Nothing for any other model, and where nothing is known of what it takes.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return
    for both in (False, True):
        maker = InputMaker(model, config, generator, both)
        if (found := maker.inputs(1)) is not None and (not both or maker.takes_both):
            yield found


def marks(config: Any) -> frozenset[int]:
    """Return the tokens that stand for an image, a video or a sound in a text."""
    found = (value for key, value in vars(config).items() if _MARKS.search(key))
    return frozenset(value for value in found if isinstance(value, int))


def forward_arguments(model: nn.Module) -> set[str]:
    """Return the names of a forward's arguments; of a wrapper's that passes all on, the inner's."""
    held = inspect.signature(model.forward).parameters
    passes_on = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in held.values())
    inner = next(iter(model.children()), None)
    return forward_arguments(inner) if passes_on and inner is not None else set(held)


class InputMaker:
    """Makes the inputs that every use of a model gives, by the names of its arguments.

    Args:
        model: the model.
        config: its configuration, which tells sizes.
        generator: draws them.
        both: whether a model of text and images gets both.
    """

    def __init__(
        self, model: nn.Module, config: Any, generator: torch.Generator, both: bool = False
    ) -> None:
        self.config, self.generator, self.both = config, generator, both
        self.names = forward_arguments(model)
        self.main = getattr(model, "main_input_name", "input_ids")
        self.device, self.dtype = device_of(model), dtype_of(model)

    @property
    def takes_both(self) -> bool:
        """Whether the forward takes text and images."""
        return {"input_ids", "pixel_values"} <= self.names

    def inputs(self, batch: int) -> dict[str, Any] | None:
        """Return inputs of a batch; None where nothing is known of what the model takes."""
        config, main, names = self.config, self.main, self.names
        found: dict[str, Any] = {}
        if main == "pixel_values" and main in names:
            found[main] = self._floats(batch, *_image_shape(config))
        elif main == "input_features" and main in names:
            found[main] = self._floats(batch, *_feature_shape(config))
        elif main == "input_values" and main in names:
            patches = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")
            shape = (config.max_length, config.num_mel_bins) if patches else (1600,)
            found[main] = self._floats(batch, *shape)
        elif "input_ids" in names:
            found["input_ids"] = self._tokens(batch, _LENGTH)
        else:
            return None
        if self.both and self.takes_both:
            found.setdefault("input_ids", self._tokens(batch, _LENGTH))
            found.setdefault("pixel_values", self._floats(batch, *_image_shape(config)))
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
            found["decoder_input_ids"] = self._tokens(batch, 5)
        return found

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        text = getattr(self.config, "text_config", None) or self.config
        size = getattr(text, "vocab_size", None) or _VOCABULARY
        low = 3 if size > 8 else 0
        ids = torch.randint(low, size, (batch, length), generator=self.generator)
        if taken := marks(self.config):  # a token that stands for an image wants the image
            plain = next((n for n in range(low, size) if n not in taken), low)
            ids[torch.isin(ids, torch.tensor(sorted(taken)))] = plain
        return ids.to(self.device)

    def _floats(self, batch: int, *shape: int) -> torch.Tensor:
        drawn = torch.randn(batch, *shape, generator=self.generator)
        return drawn.to(self.device, self.dtype)


def _image_shape(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    frames = getattr(vision, "num_frames", None)  # a film
    return *((int(frames),) if frames else ()), int(channels), int(height), int(width)


def _feature_shape(config: Any) -> tuple[int, int]:
    bins = getattr(config, "num_mel_bins", None) or 80
    frames = getattr(config, "max_source_positions", None)
    if getattr(config, "model_type", "") == "whisper" and frames:
        return int(bins), 2 * int(frames)
    width = getattr(config, "input_feat_per_channel", None) or bins
    return 32, int(getattr(config, "feature_projection_input_dim", None) or width)
