"""Families of transformers as tiny random models: one configuration a model type.

A configuration keeps what makes a family itself and loses its size: widths, depths, vocabulary,
experts. Sizes are set by the names that configurations share, where they are there. Which norms
only linear layers read stands in `decoders` and `others`, by hand, from the forwards.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks._optional import required
from benchmarks.transformer_families import decoders, others

transformers = required("transformers")

_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "n_embed": 32,
    "embed_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_size": 32, "patch_size": 8, "rotary_dim": 4, "ffn_hidden_size": 48,
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 16,
    "attention_hidden_size": 32, "time_step_rank": 4, "expert_ffn_hidden_size": 16,
    "num_codebooks": 2, "decoder_start_token_id": 1, "sliding_window": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model type, its class, and what its configuration needs beside small sizes.

    `foldable` are ends of names of the norms that only linear layers read, by hand.
    """

    name: str
    kind: str
    model: str | None = None
    foldable: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def ties(self) -> bool:
        """Whether it is measured with a tied head as well."""
        return self.kind == "decoder"


def families() -> Iterator[Family]:
    """Yield every family, decoders first."""
    for name, norms in decoders.DECODERS.items():
        config = decoders.CONFIGURATIONS.get(name, {})
        yield Family(name, "decoder", None, tuple(norms.split()), config)
    for name, (model, norms) in others.OTHERS.items():
        config = others.CONFIGURATIONS.get(name, {})
        yield Family(name, "other", model, tuple(norms.split()), config)


def foldable(family: Family, model: nn.Module) -> list[str]:
    """Return the norms of a model that the list of its family names."""
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1 and _named(family, name)
    ]


def _named(family: Family, name: str) -> bool:
    plain = re.sub(r"\.\d+(?=\.|$)", "", name)
    return any(
        f".{given}".endswith(f".{end}") for end in family.foldable for given in (name, plain)
    )


def made(family: Family, *, tied: bool) -> nn.Module:
    """Return a tiny random model in eval mode, every 1-D parameter drawn anew.

    Raises:
        LookupError: this version of transformers has no such family.
    """
    transformers.logging.set_verbosity_error()
    kind, config_class = _classes(family)
    wanted = {**_small(config_class), **family.config}
    if family.ties:
        wanted["tie_word_embeddings"] = tied
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config_class(**wanted)).eval()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if sum(size > 1 for size in parameter.shape) <= 1:
            drawn = torch.rand(parameter.shape, generator=generator) + 0.5
            parameter.data = drawn.to(parameter.dtype)
    return model


def _small(config_class: type) -> dict[str, Any]:
    """Return the small sizes that a configuration knows."""
    names = set(inspect.signature(config_class).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", {}))
    names |= set(vars(config_class()))
    return {key: value for key, value in _SMALL.items() if key in names}


def _classes(family: Family) -> tuple[Any, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    key = others.CONFIGURED_BY.get(family.name, family.name)
    if key not in CONFIG_MAPPING:
        raise LookupError(f"transformers {transformers.__version__} has no {key}")
    config_class = CONFIG_MAPPING[key]
    name = family.model or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family.name)
    if name is None:
        raise LookupError(f"{family.name} is no language model")
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    return getattr(module, str(name)), config_class
