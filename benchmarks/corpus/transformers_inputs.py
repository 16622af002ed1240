"""Inputs for a model of transformers, made from the names of the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

_JOINT = ("pixel_values", "input_ids", "decoder_input_ids")
"""Arguments that are given although they are optional: models for images and text need both."""
_TIME_SERIES = (
    "past_values",
    "past_time_features",
    "past_observed_mask",
    "future_values",
    "future_time_features",
)
_PAIRS = frozenset({"efficientloftr", "superglue"})
_SIDES = {"tvp": 448}


def candidates(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield positional inputs with every required or main argument bound by its name."""
    config: Any = model.config
    if config.model_type == "omdet-turbo":
        yield _detection_by_text()
        return
    vision = getattr(config, "vision_config", None)
    size = getattr(config, "image_size", None) or getattr(vision, "image_size", None)
    side = size[0] if isinstance(size, (list, tuple)) else size
    for candidate in dict.fromkeys((_SIDES.get(config.model_type) or side or 64, 64, 224, 384)):
        yield _bind(model, int(candidate))


def _bind(model: nn.Module, side: int) -> tuple[Any, ...]:
    """Return positional arguments up to the last one that has to be given; None between them."""
    parameters = inspect.signature(model.forward).parameters.values()
    config: Any = model.config
    main = getattr(model, "main_input_name", "")
    series = hasattr(config, "lags_sequence")
    values: list[Any] = []
    needed = 0
    for position, parameter in enumerate(parameters, start=1):
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        required = parameter.default is parameter.empty or parameter.name in (*_JOINT, main)
        if series and parameter.name in _TIME_SERIES:
            value: Tensor | None = _time_series(parameter.name, config)
        else:
            value = _value(parameter.name, config, side, required=required)
        values.append(value)
        if value is not None:
            needed = position
    return tuple(values[:needed])


def _value(name: str, config: PretrainedConfig, side: int, *, required: bool) -> Tensor | None:
    if name == "input_features" and config.model_type in ("clap", "clap_audio_model"):
        return _random(1, 1, 1001, getattr(config, "audio_config", config).num_mel_bins)
    if name == "input_features" and config.model_type.startswith("granite_speech5_"):
        return _random(1, 64, 4 * getattr(config, "encoder_config", config).num_mel_bins)
    if name == "is_longer" and config.model_type in ("clap", "clap_audio_model"):
        return torch.tensor([[False]])
    if not required:
        return None
    if name in ("input_ids", "decoder_input_ids"):
        tokens = min(99, _first(getattr(config, "model_config", config), "vocab_size") or 99)
        return torch.randint(2, tokens, (1, 12), generator=_generator())
    shape = _shape(name, config, side)
    return None if shape is None else _random(*shape)


def _shape(name: str, config: PretrainedConfig, side: int) -> tuple[int, ...] | None:
    vision = getattr(config, "vision_config", None) or config
    channels = _first(vision, "num_channels", "in_channels") or 3
    frames = getattr(config, "num_frames", None)
    if config.model_type in _PAIRS:  # a keypoint matcher looks at two grey images
        return (1, 2, 3, side, side) if name == "pixel_values" else None
    encoder = getattr(config, "encoder_config", None) or config
    bins = _first(encoder, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = _first(encoder, "input_dim") or bins or 80
    audio = "input_dim" in vars(config) and "num_channels" not in vars(config)
    shapes: dict[str, tuple[int, ...]] = {
        "pixel_values": (1, *((frames,) if frames else ()), channels, side, side),
        "pixel_values_videos": (1, frames or 4, channels, side, side),
        "input_values": (1, 4000),
        "input_features": (1, 3000 if "whisper" in config.model_type else 64, bins),
        "hidden_states": (1, 64, bins) if audio else (1, channels, side, side),
        "past_values": (
            1,
            getattr(config, "context_length", None) or 32,
            getattr(config, "num_input_channels", 1),
        ),
        "spectrogram": (1, 64, bins),
    }
    return shapes.get(name)


def _time_series(name: str, config: PretrainedConfig) -> Tensor:
    """Return what a forecaster is given: its context, the lags before it, and the future."""
    past = config.context_length + max(config.lags_sequence)
    length = past if name.startswith("past") else config.prediction_length
    if name.endswith("time_features"):
        features = max(config.num_time_features, 1)
        return _random(1, length, features)[..., : config.num_time_features]
    values = _random(1, length)
    return torch.ones_like(values) if name.endswith("mask") else values


def _detection_by_text() -> tuple[Any, ...]:
    """Return an image, two classes and one task for OmDet-Turbo."""
    tokens = torch.randint(2, 99, (3, 8), generator=_generator())
    mask = torch.ones(3, 8, dtype=torch.long)
    image = _random(1, 3, 640, 640)
    return image, tokens[:2], mask[:2], tokens[2:], mask[2:], torch.tensor([2])


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
