"""transformers: every configuration whose model has a convolution or a BatchNorm, made small.

A configuration keeps its widths, so that its consistency checks hold, and loses depth and
vocabulary: two layers a stack, 1,000 tokens.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import (  # type: ignore[attr-defined, unused-ignore]
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from benchmarks.corpus import transformers_inputs

_LAYER = re.compile(r"BatchNorm|\bConv[123]d\b|ConvTranspose[123]d")
_DEPTH = re.compile(
    r"^(num_(hidden_)?layers|num_.*_layers|n_layers?|num_.*_blocks|.*encoder_layers|"
    r".*decoder_layers|depth|layers|encoder_depth|decoder_depth)$"
)
_DEPTHS = frozenset({"depths", "stage_num_blocks", "num_blocks", "layer_depths"})
_VOCABULARY = 1000
_GIVEN: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "timm_backbone": {"backbone": "resnet18", "use_pretrained_backbone": False},
    "uvdoc": {
        "backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2, 3, 4, 5, 6]}
    },
}
"""What a configuration has no default for, or where its defaults do not fit each other."""
_WHOLE = frozenset({"uvdoc"})
"""Configurations that list the widths of all their layers elsewhere: none can be left out."""


def architectures() -> Iterator[str]:
    """Yield the model types whose modeling file names a convolution or a BatchNorm."""
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        if _LAYER.search(_code(model_type)):
            yield model_type


def names_batch_norm(architecture: str) -> bool:
    """Return whether the modeling file mentions BatchNorm; backbones may bring it without that."""
    return "BatchNorm" in _code(architecture)


def candidates(architecture: str, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield positional inputs with every required or main argument bound by its name."""
    yield from transformers_inputs.candidates(model)


def make(architecture: str) -> nn.Module:
    """Build one small model with random weights; whole, if its checks do not allow it small."""
    transformers.logging.set_verbosity_error()
    config = CONFIG_MAPPING[architecture](**_GIVEN.get(architecture, {}))
    whole = copy.deepcopy(config)
    model_class = _model_class(architecture, type(config))
    if architecture in _WHOLE:
        return model_class(whole)
    shrink(config)
    try:
        return model_class(config)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError):
        return model_class(whole)


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
            setattr(config, key, type(value)(min(depth, 2) for depth in value))
        elif key == "vocab_size" and isinstance(value, int) and value > _VOCABULARY:
            config.vocab_size = _VOCABULARY
        elif key.endswith("_token_id") and isinstance(value, int) and value >= _VOCABULARY:
            setattr(config, key, 1)
    types = vars(config).get("layer_types")
    if isinstance(types, list) and isinstance(getattr(config, "num_hidden_layers", None), int):
        config.layer_types = types[: config.num_hidden_layers]


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
    """Return the base model of a configuration, or a model of its package that takes it."""
    module = importlib.import_module(_module_name(model_type))
    registered = MODEL_MAPPING_NAMES.get(model_type)
    for name in [registered] if isinstance(registered, str) else registered or ():
        if hasattr(module, name):
            model_class: type[PreTrainedModel] = getattr(module, name)
            return model_class
    folder = Path(str(module.__file__)).parent
    package = module.__name__.rpartition(".")[0]
    for path in [Path(str(module.__file__)), *sorted(folder.glob("modeling_*.py"))]:
        found = list(_models_in(f"{package}.{path.stem}", config_class))
        if found:
            return min(found, key=lambda item: not item.__name__.endswith("Model"))
    raise LookupError(
        f"{config_class.__name__} describes a part of another model: no model class takes it"
    )


def _models_in(
    module_name: str, config_class: type[PretrainedConfig]
) -> Iterator[type[PreTrainedModel]]:
    """Yield the models of a file that take `config_class`, in the file's order."""
    for found in vars(importlib.import_module(module_name)).values():
        if (
            inspect.isclass(found)
            and issubclass(found, PreTrainedModel)
            and found.__module__ == module_name
            and not found.__name__.endswith("PreTrainedModel")
            and getattr(found, "config_class", None) is config_class
            and _has_forward(found)
        ):
            yield found


def _has_forward(kind: Any) -> bool:
    return kind.forward is not nn.Module.forward
