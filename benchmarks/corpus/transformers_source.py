"""transformers: every configuration whose model has a convolution or a BatchNorm, made small.

A configuration keeps its widths, so that its consistency checks hold, and loses depth and
vocabulary: two layers a stack, 1,000 tokens. Inputs are made from the names of the arguments that
the forward requires.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

_LAYER = re.compile(r"BatchNorm|\bConv[123]d\b|ConvTranspose[123]d")
_DEPTH = re.compile(
    r"^(num_(hidden_)?layers|num_.*_layers|n_layers?|num_.*_blocks|.*encoder_layers|"
    r".*decoder_layers|depth|layers|encoder_depth|decoder_depth)$"
)
_DEPTHS = frozenset({"depths", "stage_num_blocks", "num_blocks", "layer_depths"})
_VOCABULARY = 1000


def architectures() -> Iterator[str]:
    """Yield the model types whose modeling file names a convolution or a BatchNorm."""
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        if _LAYER.search(_code(model_type)):
            yield model_type


def names_batch_norm(architecture: str) -> bool:
    """Return whether the modeling file mentions BatchNorm; backbones may bring it without that."""
    return "BatchNorm" in _code(architecture)


def make(architecture: str) -> nn.Module:
    """Build one small model with random weights."""
    transformers.logging.set_verbosity_error()
    config = CONFIG_MAPPING[architecture]()
    shrink(config)
    return _model_class(architecture, type(config))(config)


def shrink(config: PretrainedConfig) -> None:
    """Cut depth and vocabulary of `config`, and of the configurations inside it, in place."""
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif key == "use_timm_backbone" and value:
            config.use_pretrained_backbone = False
        elif isinstance(value, bool) or key.startswith("_"):
            continue
        elif _DEPTH.match(key) and isinstance(value, int) and value > 2:
            setattr(config, key, 2)
        elif key in _DEPTHS and isinstance(value, (list, tuple)):
            setattr(config, key, [min(depth, 2) for depth in value])
        elif key == "vocab_size" and isinstance(value, int) and value > _VOCABULARY:
            config.vocab_size = _VOCABULARY
        elif key.endswith("_token_id") and isinstance(value, int) and value >= _VOCABULARY:
            setattr(config, key, 1)
    types = getattr(config, "layer_types", None)
    if isinstance(types, list) and isinstance(getattr(config, "num_hidden_layers", None), int):
        config.layer_types = types[: config.num_hidden_layers]


def candidates(architecture: str, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield positional inputs with every required or main argument bound by its name."""
    config = model.config
    size = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", None
    )
    side = size[0] if isinstance(size, (list, tuple)) else size
    for candidate in dict.fromkeys((side or 64, 64, 224, 384)):
        yield _bind(model, int(candidate))


def _bind(model: nn.Module, side: int) -> tuple[Any, ...]:
    """Return positional arguments up to the last one that has to be given; None between them."""
    parameters = inspect.signature(model.forward).parameters.values()
    main = getattr(model, "main_input_name", "")
    values: list[Any] = []
    needed = 0
    for position, parameter in enumerate(parameters, start=1):
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        required = parameter.default is parameter.empty
        joint = parameter.name in ("pixel_values", "input_ids", "decoder_input_ids")
        value = _value(parameter.name, model, side) if required or joint else None
        if parameter.name == main and value is None:
            value = _value(parameter.name, model, side)
        values.append(value)
        if value is not None:
            needed = position
    return tuple(values[:needed])


def _value(name: str, model: nn.Module, side: int) -> Tensor | None:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    vision = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    frames = getattr(config, "num_frames", None)
    tokens = torch.randint(2, 99, (1, 12), generator=generator)
    bins = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    length = getattr(config, "context_length", None) or 32
    variables = getattr(config, "num_input_channels", 1)
    values = {
        "pixel_values": (1, *((frames,) if frames else ()), channels, side, side),
        "pixel_values_videos": (1, frames or 4, channels, side, side),
        "input_values": (1, 4000),
        "input_features": (1, 3000 if "whisper" in config.model_type else 64, bins or 80),
        "past_values": (1, length, variables),
        "spectrogram": (1, 64, bins or 80),
    }
    if name in values:
        return torch.rand(*values[name], generator=generator)
    return tokens if name in ("input_ids", "decoder_input_ids") else None


def _first(config: PretrainedConfig, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


@lru_cache(maxsize=1024)
def _code(model_type: str) -> str:
    """Return the text of the modeling file of a model type, "" if it has none."""
    parts = _module_name(model_type).removeprefix("transformers.").split(".")
    path = Path(transformers.__file__).parent.joinpath(*parts).with_suffix(".py")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _module_name(model_type: str) -> str:
    package = transformers.models.auto.configuration_auto.model_type_to_module_name(model_type)
    return f"transformers.models.{package}.modeling_{package}"


def _model_class(model_type: str, config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Return the base model of a configuration, or the first model of its file that takes it."""
    module = importlib.import_module(_module_name(model_type))
    registered = MODEL_MAPPING_NAMES.get(model_type)
    for name in [registered] if isinstance(registered, str) else registered or ():
        if hasattr(module, name):
            model_class: type[PreTrainedModel] = getattr(module, name)
            return model_class
    for found in vars(module).values():
        if (
            inspect.isclass(found)
            and issubclass(found, PreTrainedModel)
            and found.__module__ == module.__name__
            and not found.__name__.endswith("PreTrainedModel")
            and getattr(found, "config_class", None) is config_class
        ):
            return found
    raise LookupError(f"{model_type}: no model class takes {config_class.__name__}")
