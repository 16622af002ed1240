"""Decoder families: configurations, and by hand which of their norms only linear layers read.

Written from the forwards of transformers 5.24, not from what folds. A name is the end of the
qualified names of norms, without the numbers of layers. Left out by reading, everywhere:

    q_norm, k_norm ...          a rotation by position stands between norm and product
    kv_a_layernorm              the cache keeps its output
    post_..._layernorm of Gemma2, OLMo2, Exaone4, GLM4, AFMoE: behind a block, its output is added
"""

from __future__ import annotations

from typing import Any

_STANDARD = "input_layernorm post_attention_layernorm model.norm"
_GPT = "ln_1 ln_2 ln_f"
_GEMMA2 = "input_layernorm pre_feedforward_layernorm model.norm"
_MLA = f"{_STANDARD} q_a_layernorm"
_MODEL_NORM = "model.norm"

DECODERS: dict[str, str] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma",
         "phi3", "stablelm", "starcoder2", "olmoe", "granite", "granitemoe", "granitemoeshared",
         "glm", "glm4", "glm4_moe", "helium", "nemotron", "gpt_oss", "ernie4_5", "ernie4_5_moe",
         "arcee", "smollm3", "hunyuan_v1_dense", "hunyuan_v1_moe", "diffllama", "jetmoe",
         "seed_oss", "dots1", "doge", "ministral", "cwm"),
        _STANDARD,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "youtu"), _MLA),
    **dict.fromkeys(("gemma2", "gemma3_text", "vaultgemma"), _GEMMA2),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "flex_olmo"), _MODEL_NORM),
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode"), _GPT),
    **dict.fromkeys(("gptj", "codegen"), "ln_1 ln_f"),
    **dict.fromkeys(
        ("gpt_neox", "gpt_neox_japanese"),
        "input_layernorm post_attention_layernorm final_layer_norm",
    ),
    **dict.fromkeys(("cohere", "cohere2"), "input_layernorm model.norm"),
    **dict.fromkeys(("mamba", "falcon_mamba"), "layers.norm norm_f"),
    **dict.fromkeys(("olmo", "nanochat"), ""),  # norms without weights
    "opt": "self_attn_layer_norm final_layer_norm",
    "bloom": "input_layernorm post_attention_layernorm ln_f",  # the stream begins at the first
    "falcon": "input_layernorm ln_f",
    "phi": "input_layernorm final_layernorm",
    "phimoe": "input_layernorm model.norm",  # LayerNorm before experts that have no bias
    "persimmon": "input_layernorm post_attention_layernorm final_layernorm",
    "mpt": "norm_1 norm_2 norm_f",
    "biogpt": "self_attn_layer_norm final_layer_norm biogpt.layer_norm",
    "xglm": "self_attn_layer_norm final_layer_norm model.layer_norm",
    "dbrx": "norm_1 norm_2 norm_f",
    "ctrl": "layernorm1 layernorm2 transformer.layernorm",
    "openai-gpt": "h.1.ln_2",  # post-norm: of the last block alone, which the head reads
    "minimax": "self_attn.norm model.norm",  # the residual is taken behind the other norms
    "bitnet": f"{_STANDARD} attn_sub_norm ffn_sub_norm",
    "apertus": "attention_layernorm feedforward_layernorm model.norm",
    "lfm2": "operator_norm ffn_norm embedding_norm",
    "mamba2": "layers.norm mixer.norm norm_f",
    "falcon_h1": "input_layernorm pre_ff_layernorm final_layernorm",
    "bamba": "input_layernorm pre_ff_layernorm mamba.norm final_layernorm",
    "jamba": "input_layernorm pre_ff_layernorm dt_layernorm final_layernorm",  # not b, c: a scan
    "rwkv": "ln_out",  # the state keeps what the others make
    "recurrent_gemma": "temporal_pre_norm channel_pre_norm final_norm",
    # The first norm before experts is read by experts that are identities, too.
    "longcat_flash": "input_layernorm post_attention_layernorm.1 q_a_layernorm model.norm",
    "afmoe": "input_layernorm pre_mlp_layernorm model.norm",
}  # fmt: skip
"""Per model type, the norms that only linear layers read."""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    **{
        name: {"num_key_value_heads": 4}
        for name in ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "longcat_flash")
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
"""What a configuration needs beside small sizes."""
