"""Families of transformers as tiny random models: one configuration a model type.

A configuration keeps what makes a family itself and loses its size: widths, depths, vocabulary,
experts. Sizes are set by the names that configurations share, where they are there.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

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
    """A model type, its class, what its configuration needs beside small sizes.

    `kept` are ends of names of norms that stay, beside those that stay in every family.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    ties: bool = False


_BEHIND = frozenset({"post_attention_layernorm", "post_feedforward_layernorm"})
_STREAM = frozenset({"LayerNorm", "_layer_norm", "layer_norm", "layernorm_embedding"})
"""Post-norm: what the norm makes is the residual stream."""
_ENCODER = frozenset({"encoder.layer_norm", "encoder.final_layer_norm"})
"""The last norm of an encoder: what it makes is returned as encoder_last_hidden_state."""

_KEPT: dict[str, frozenset[str]] = {
    "gemma2": _BEHIND, "gemma3_text": _BEHIND, "gemma3n_text": _BEHIND, "olmo2": _BEHIND,
    "olmo3": _BEHIND, "exaone4": _BEHIND, "glm4": frozenset({"post_self_attn_layernorm"}),
    "bloom": frozenset({"word_embeddings_layernorm"}),  # the stream begins behind it
    "falcon": frozenset({"input_layernorm"}),  # a linear class of its own, without bias
    "phimoe": frozenset({"post_attention_layernorm"}),  # a shift, and a router without bias
    "openai-gpt": frozenset({"ln_1", "ln_2"}),
    "minimax": frozenset({"input_layernorm", "post_attention_layernorm"}),  # the stream itself
    "diffllama": frozenset({"groupnorm"}),  # it has no weight
    "bert": _STREAM, "roberta": _STREAM, "electra": _STREAM, "distilbert": _STREAM,
    "albert": _STREAM, "deberta-v2": _STREAM, "mpnet": _STREAM, "bart": _STREAM,
    "plbart": _STREAM, "marian": _STREAM, "wav2vec2": _STREAM, "hubert": _STREAM,
    "t5": _ENCODER, "mt5": _ENCODER, "umt5": _ENCODER, "mbart": _ENCODER, "pegasus": _ENCODER,
    "blenderbot": _ENCODER, "m2m_100": _ENCODER, "whisper": _ENCODER,
}  # fmt: skip

DECODERS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gpt_neox_japanese",
    "gptj", "gpt_bigcode", "codegen", "opt", "bloom", "falcon", "phi",
    "phi3", "phimoe", "stablelm", "starcoder2", "cohere", "cohere2", "olmo",
    "olmo2", "olmo3", "olmoe", "granite", "granitemoe", "granitemoeshared", "deepseek_v2",
    "deepseek_v3", "glm", "glm4", "glm4_moe", "helium", "persimmon", "nemotron",
    "mpt", "biogpt", "xglm", "dbrx", "ctrl", "openai-gpt", "gpt_oss",
    "ernie4_5", "ernie4_5_moe", "arcee", "smollm3", "hunyuan_v1_dense", "hunyuan_v1_moe", "minimax",
    "exaone4", "bitnet", "diffllama", "jetmoe", "apertus", "seed_oss", "dots1",
    "lfm2", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba",
    "zamba", "rwkv", "recurrent_gemma", "doge", "vaultgemma", "flex_olmo", "longcat_flash",
    "ministral", "minicpm3", "nanochat", "youtu", "cwm", "afmoe",
)  # fmt: skip

ENCODERS = {
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "electra": "ElectraForMaskedLM",
    "distilbert": "DistilBertForMaskedLM", "albert": "AlbertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM", "esm": "EsmForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM", "mpnet": "MPNetForMaskedLM",
    "roberta-prelayernorm": "RobertaPreLayerNormForMaskedLM",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration", "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration", "pegasus": "PegasusForConditionalGeneration",
    "marian": "MarianMTModel", "blenderbot": "BlenderbotForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
    "plbart": "PLBartForConditionalGeneration",
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification",
    "beit": "BeitForImageClassification", "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "swin": "SwinForImageClassification", "convnext": "ConvNextForImageClassification",
    "convnextv2": "ConvNextV2ForImageClassification",
    "segformer": "SegformerForImageClassification",
    "pvt": "PvtForImageClassification", "vit_msn": "ViTMSNForImageClassification",
    "siglip": "SiglipModel", "clip": "CLIPModel", "ijepa": "IJepaForImageClassification",
    "audio-spectrogram-transformer": "ASTForAudioClassification",
    "wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC", "data2vec-vision":
    "Data2VecVisionForImageClassification", "focalnet": "FocalNetForImageClassification",
}  # fmt: skip

_CONFIG: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "deepseek_v2": {"num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8}, "ffn_config":
             {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "whisper": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    "albert": {"embedding_size": 16}, "electra": {"embedding_size": 16},
    "audio-spectrogram-transformer": {"max_length": 32, "patch_size": 8, "frequency_stride": 8,
                                      "time_stride": 8},
    "swin": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
             "patch_size": 4},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16},
    "pvt": {"hidden_sizes": [8, 8, 16, 16], "image_size": 64, "patch_sizes": [4, 2, 2, 2],
            "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "clip": {"text_config": dict(_SMALL, hidden_size=32), "vision_config": dict(_SMALL)},
    "siglip": {"text_config": dict(_SMALL, hidden_size=32), "vision_config": dict(_SMALL)},
    "wav2vec2": {"conv_dim": [8, 8, 8], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
                 "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
                 "num_conv_pos_embedding_groups": 2},
    "hubert": {"conv_dim": [8, 8, 8], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
               "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
               "num_conv_pos_embedding_groups": 2},
}  # fmt: skip


def families() -> Iterator[Family]:
    """Yield every family, decoders first."""
    for name in DECODERS:
        yield Family(
            name, "decoder", _CONFIG.get(name, {}), _KEPT.get(name, frozenset()), ties=True
        )
    for name in ENCODERS:
        yield Family(name, "other", _CONFIG.get(name, {}), _KEPT.get(name, frozenset()))


def made(family: Family, *, tied: bool) -> nn.Module:
    """Return a tiny random model in eval mode, every 1-D parameter drawn anew.

    Raises:
        LookupError: this version of transformers has no such family.
    """
    transformers.logging.set_verbosity_error()
    kind, config_class = _classes(family)
    wanted = {**_small(config_class), **family.config}
    if family.kind == "decoder":
        wanted["tie_word_embeddings"] = tied
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config_class(**wanted)).eval()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
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

    if family.name not in CONFIG_MAPPING:
        raise LookupError(f"transformers {transformers.__version__} has no {family.name}")
    config_class = CONFIG_MAPPING[family.name]
    name = ENCODERS.get(family.name) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family.name)
    if name is None:
        raise LookupError(f"{family.name} is no language model")
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    return getattr(module, str(name)), config_class
