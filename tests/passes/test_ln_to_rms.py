"""`ln-to-rms`: exact on centred streams, declined with the writer's name on all others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm
from rewrite.nn import ShiftedRMSNorm
from tests.streams.blocks import PreNorm, X, centred, draw, error
from tests.streams.families import untrained


def norms(model: nn.Module) -> set[str]:
    kinds = (nn.LayerNorm, nn.RMSNorm, ShiftedRMSNorm)
    return {type(m).__name__ for m in model.modules() if isinstance(m, kinds)}


def test_rewrites_a_pre_norm_stream_and_carries_weight_and_bias() -> None:
    model = draw(PreNorm())
    result = centred(model)
    (change,) = result.report.changes
    assert change.recipe["map"] == {"kind": "centre", "size": 16}
    assert norms(result.model) == {"ShiftedRMSNorm"}
    assert error(model, result.model, X) < 1e-13
    assert set(result.model.state_dict()) == set(model.state_dict())


def test_a_folded_stream_gets_rms_norms_without_weight_and_bias() -> None:
    model = draw(PreNorm())
    result = rewrite.convert(model, [FoldNorm(), LayerNormToRMSNorm()], example_inputs=X)
    assert norms(result.model) == {"RMSNorm"}
    assert not [name for name in result.model.state_dict() if "norm" in name]
    assert error(model, result.model, X) < 1e-13


_SMALL = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config", "writer"),
    [
        ("BertModel", _SMALL, "bert|embeddings.LayerNorm"),
        (
            "BloomForCausalLM",
            {"vocab_size": 48, "hidden_size": 16, "n_layer": 1, "n_head": 2},
            "word_embeddings_layernorm",
        ),
        (
            "CLIPVisionModel",
            {**_SMALL, "image_size": 8, "patch_size": 4},
            "pre_layrnorm",
        ),
    ],
)
def test_declines_with_the_writers_name(name: str, config: dict[str, Any], writer: str) -> None:
    report = rewrite.convert(draw(untrained(name, **config)), "ln-to-rms", verify=False).report
    assert not report.changes
    assert any(part in report.skips[0].reason for part in writer.split("|"))
    assert "written by layer_norm" in report.skips[0].reason


@pytest.mark.filterwarnings("ignore")
def test_a_tied_embedding_needs_untie() -> None:
    sizes = {**_SMALL, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = draw(untrained("Starcoder2ForCausalLM", **sizes, tie_word_embeddings=True))
    (skip,) = rewrite.convert(model, "ln-to-rms", verify=False).report.skips
    assert "lm_head shares its weight" in skip.reason
    result = rewrite.convert(model, LayerNormToRMSNorm(untie=True))
    assert result.report.ok and result.model.config.tie_word_embeddings is False
    assert result.report.verification is not None
    assert result.report.verification.max_rel < 1e-10
    names = {case.name for case in result.report.verification.cases}
    assert {"padded mask, batch 2", "cache step"} <= names
