"""Encoders, encoder-decoders, vision and audio: classes, and by hand which norms fold.

Written from the forwards of transformers 5.24, not from what folds. A name is the end of the
qualified names of norms, without the numbers of layers, unless it names one. Left out by reading:

    post-norm blocks (BERT, BART, wav2vec2): the norm's output is the residual stream, but the last
    the last norm of an encoder: returned as encoder_last_hidden_state, image_embeds ...
    norms of embeddings that begin the stream, norms behind a block (Swin V2), GroupNorm
"""

from __future__ import annotations

from typing import Any

_VIT = "layernorm_before layernorm_after"
_CROSS = "self_attn_layer_norm final_layer_norm encoder_attn_layer_norm decoder.layer_norm"
_T5 = "layer.layer_norm decoder.final_layer_norm"
_BERT = "layer.1.output.LayerNorm transform.LayerNorm"
_CLIP = "layer_norm1 layer_norm2"
_SPEECH = "feature_projection.layer_norm layers.1.final_layer_norm"

OTHERS: dict[str, tuple[str, str]] = {
    # Encoders of text
    "bert": ("BertForMaskedLM", _BERT),
    # Its embeddings are narrower than its stream: a linear map reads their norm.
    "electra": (
        "ElectraForMaskedLM",
        "embeddings.LayerNorm layer.1.output.LayerNorm generator_predictions.LayerNorm",
    ),
    "roberta": ("RobertaForMaskedLM", "layer.1.output.LayerNorm lm_head.layer_norm"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "layer.1.output.LayerNorm lm_head.layer_norm"),
    "camembert": ("CamembertForMaskedLM", "layer.1.output.LayerNorm lm_head.layer_norm"),
    "distilbert": ("DistilBertForMaskedLM", "layer.1.output_layer_norm vocab_layer_norm"),
    # One block for every layer: of its norms none; its first layer reads a linear map.
    "albert": ("AlbertForMaskedLM", "embeddings.LayerNorm predictions.LayerNorm"),
    "modernbert": ("ModernBertForMaskedLM", "attn_norm mlp_norm final_norm head.norm"),
    "esm": (
        "EsmForMaskedLM",
        "attention.LayerNorm layer.LayerNorm emb_layer_norm_after lm_head.layer_norm",
    ),
    "deberta-v2": ("DebertaV2ForMaskedLM", _BERT),
    "mpnet": ("MPNetForMaskedLM", "layer.1.output.LayerNorm lm_head.layer_norm"),
    "roberta-prelayernorm": (
        "RobertaPreLayerNormForMaskedLM",
        "attention.LayerNorm intermediate.LayerNorm roberta_prelayernorm.LayerNorm "
        "lm_head.layer_norm",
    ),
    "megatron-bert": (
        "MegatronBertForMaskedLM", "attention.ln layer.ln encoder.ln transform.LayerNorm",
    ),
    "xlm-roberta-xl": (
        "XLMRobertaXLForMaskedLM",
        "self_attn_layer_norm layer.LayerNorm encoder.LayerNorm lm_head.layer_norm",
    ),
    "eurobert": (
        "EuroBertForMaskedLM", "input_layernorm post_attention_layernorm model.norm",
    ),
    # Encoder-decoders
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": ("MT5ForConditionalGeneration", _T5),
    "umt5": ("UMT5ForConditionalGeneration", _T5),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", _T5),
    # It returns what its last norm makes, as decoder_hidden_states.
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        "pre_self_attn_layernorm pre_cross_attn_layernorm pre_feedforward_layernorm",
    ),
    "bart": ("BartForConditionalGeneration", "decoder.layers.1.final_layer_norm"),
    "plbart": ("PLBartForConditionalGeneration", "decoder.layers.1.final_layer_norm"),
    "marian": ("MarianMTModel", "decoder.layers.1.final_layer_norm"),
    "mbart": ("MBartForConditionalGeneration", _CROSS),
    "pegasus": ("PegasusForConditionalGeneration", _CROSS),
    "blenderbot": ("BlenderbotForConditionalGeneration", _CROSS),
    "m2m_100": ("M2M100ForConditionalGeneration", _CROSS),
    # Vision
    "vit": ("ViTForImageClassification", f"{_VIT} vit.layernorm"),
    "deit": ("DeiTForImageClassification", f"{_VIT} deit.layernorm"),
    "vit_msn": ("ViTMSNForImageClassification", f"{_VIT} vit.layernorm"),
    "ijepa": ("IJepaForImageClassification", f"{_VIT} ijepa.layernorm"),
    "beit": ("BeitForImageClassification", f"{_VIT} pooler.layernorm"),
    "data2vec-vision": ("Data2VecVisionForImageClassification", f"{_VIT} pooler.layernorm"),
    "dinov2": ("Dinov2ForImageClassification", "norm1 norm2 dinov2.layernorm"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification", "norm1 norm2 dinov2_with_registers.layernorm",
    ),
    "dinov3_vit": ("DINOv3ViTModel", "norm1 norm2"),
    "videomae": ("VideoMAEForVideoClassification", f"{_VIT} fc_norm"),
    "hiera": ("HieraForImageClassification", f"{_VIT} pooler.layernorm"),
    "swin": ("SwinForImageClassification", f"{_VIT} downsample.norm swin.layernorm"),
    "swinv2": ("Swinv2ForImageClassification", "swinv2.layernorm"),
    "convnext": (
        "ConvNextForImageClassification", "layers.layernorm downsampling_layer convnext.layernorm",
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        "layers.layernorm downsampling_layer convnextv2.layernorm",
    ),
    "focalnet": ("FocalNetForImageClassification", "norm1 norm2 focalnet.layernorm"),
    # The convolutions between stages pad with zeros: what LayerNorm adds cannot pass them.
    "segformer": (
        "SegformerForImageClassification",
        f"{_VIT} sequence_reduction.layer_norm stages.3.layer_norm",
    ),
    "pvt": (
        "PvtForImageClassification",
        "layer_norm_1 layer_norm_2 self.layer_norm encoder.layer_norm",
    ),
    "siglip": ("SiglipModel", f"{_CLIP} head.layernorm"),
    # Its pooling head runs too: it reads post_layernorm by key and value projections.
    "siglip_vision": ("SiglipForImageClassification", f"{_CLIP} post_layernorm head.layernorm"),
    "siglip_text": ("SiglipTextModel", _CLIP),  # the last is returned
    "clip": ("CLIPModel", _CLIP),
    "clip_vision": ("CLIPForImageClassification", _CLIP),  # nothing reads its post_layernorm
    "clip_text": ("CLIPTextModelWithProjection", _CLIP),  # last_hidden_state is returned
    "blip": (
        "BlipForConditionalGeneration",
        f"{_CLIP} layer.1.output.LayerNorm transform.LayerNorm",
    ),
    # Audio
    "whisper": ("WhisperForConditionalGeneration", _CROSS),
    "speech_to_text": ("Speech2TextForConditionalGeneration", _CROSS),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        "input_layernorm post_attention_layernorm final_layernorm decoder.norm",
    ),
    "audio-spectrogram-transformer": (
        "ASTForAudioClassification", f"{_VIT} classifier.layernorm",
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH),
    "hubert": ("HubertForCTC", _SPEECH),
    "wavlm": ("WavLMForCTC", _SPEECH),
    "unispeech": ("UniSpeechForCTC", _SPEECH),
    "data2vec-audio": ("Data2VecAudioForCTC", _SPEECH),
    "sew": ("SEWForCTC", "sew.layer_norm layers.1.final_layer_norm"),
}  # fmt: skip
"""Per model type, its class, and the norms that only linear layers read."""

_WAVES: dict[str, Any] = {
    "conv_dim": [8, 8, 8], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 64, "projection_dim": 16}
_VISION = {**_TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 16}
_GEMMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16}, "electra": {"embedding_size": 16},
    "t5gemma": {"encoder": _GEMMA, "decoder": _GEMMA, "vocab_size": 64},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "audio-spectrogram-transformer": {"max_length": 32, "patch_size": 8, "frequency_stride": 8,
                                      "time_stride": 8},
    "swin": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
             "patch_size": 4},
    "swinv2": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
               "patch_size": 4},
    "hiera": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32],
              "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
              "query_stride": [2, 2], "masked_unit_size": [2, 2], "num_query_pool": 1},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64,
                 "patch_size": 4},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64,
                   "patch_size": 4},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16, "image_size": 64,
                  "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]},
    "pvt": {"hidden_sizes": [8, 8, 16, 16], "image_size": 64, "patch_sizes": [4, 2, 2, 2],
            "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "videomae": {"num_frames": 4, "tubelet_size": 2},
    "clip": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16},
    "siglip": {"text_config": _TEXT, "vision_config": _VISION},
    "clip_vision": {"vision_config": _VISION, "text_config": _TEXT},
    "siglip_vision": {"vision_config": _VISION, "text_config": _TEXT},
    "blip": {"text_config": {**_TEXT, "encoder_hidden_size": 32, "is_decoder": True},
             "vision_config": _VISION, "projection_dim": 16, "image_text_hidden_size": 16},
    "moonshine": {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
                  "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
                  "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 16},
    "sew": {**_WAVES, "squeeze_factor": 2},
    **{name: dict(_WAVES) for name in ("wav2vec2", "hubert", "wavlm", "unispeech")},
    "data2vec-audio": {**_WAVES, "num_conv_pos_embeddings": 2},
}  # fmt: skip
"""What a configuration needs beside small sizes."""

CONFIGURED_BY = {"siglip_vision": "siglip", "clip_vision": "clip", "clip_text": "clip_text_model",
                 "siglip_text": "siglip_text_model"}  # fmt: skip
"""The model type whose configuration a class takes, where it has another name."""
