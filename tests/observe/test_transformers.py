"""Models of transformers, converted as their users would: no inputs given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from passes import FoldNorm
from tests.streams.families import untrained

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def made(name: str, **config: Any) -> nn.Module:
    """Return a small model in float64 with every 1-D parameter drawn at random."""
    model = untrained(name, **config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.25
    return model.double().eval()


def test_llama_folds_and_is_verified_on_every_call() -> None:
    model = made("LlamaForCausalLM", **SIZES, num_key_value_heads=2)
    result = rewrite.convert(model, "fold")
    assert len(result.report.changes) == 5 and not result.report.skips
    cases = {case.name for case in result.report.verification.cases}
    assert {"padded mask, batch 2", "cache step", "16 greedy tokens"} <= cases
    assert type(result.model) is type(model)
    assert any("hidden_states" in change.note for change in result.report.changes)
    strict = rewrite.convert(model, FoldNorm(strict_outputs=True), verify=False).report
    assert [skip.target for skip in strict.skips] == ["model.norm"]


def test_gpt2_folds_into_transposed_weights_and_its_tied_head_is_said() -> None:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = made("GPT2LMHeadModel", **sizes)
    result = rewrite.convert(model, "fold")
    assert len(result.report.changes) == 4
    (skip,) = result.report.skips
    assert skip.target == "transformer.ln_f" and "untie" in skip.reason
    untied = rewrite.convert(model, FoldNorm(untie=True))
    assert len(untied.report.changes) == 5
    assert untied.model.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True


def test_vit_folds() -> None:
    model = made(
        "ViTForImageClassification", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8,
    )  # fmt: skip
    result = rewrite.convert(model, "fold")
    assert len(result.report.changes) == 5
    assert "vit.layernorm" in {change.target for change in result.report.changes}


def test_gemma2_keeps_the_norms_behind_its_blocks() -> None:
    model = made("Gemma2ForCausalLM", **SIZES, num_key_value_heads=2, head_dim=8)
    report = rewrite.convert(model, FoldNorm(untie=True)).report
    kept = {skip.target.rpartition(".")[2] for skip in report.skips}
    assert kept == {"embed_scale", "post_attention_layernorm", "post_feedforward_layernorm"}
    assert len(report.changes) == 5


@pytest.mark.filterwarnings("ignore")
def test_experts_as_transformers_makes_them_fold(capsys: pytest.CaptureFixture[str]) -> None:
    """By PyTorch's grouped product, in float32: nothing is said of what fake tensors cannot do."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    assert config._experts_implementation == "grouped_mm"
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    result = rewrite.convert(model, "fold")
    assert result.report.ok and len(result.report.changes) == 3
    assert "fake" not in capsys.readouterr().err
    assert "save_pretrained" not in str(result.report)  # what every such model has


def test_a_norm_that_only_another_call_returns_folds_where_the_model_is_traced_whole() -> None:
    """OpenAI's GPT can be traced; what it returns with all hidden states is observed, and named."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    model = made("OpenAIGPTLMHeadModel", **sizes)
    result = rewrite.convert(model, FoldNorm(untie=True))
    (change,) = [c for c in result.report.changes if c.target == "transformer.h.0.ln_2"]
    assert result.report.ok and "['hidden_states'][1]" in change.note
    strict = rewrite.convert(model, FoldNorm(untie=True, strict_outputs=True)).report
    assert not strict.changes


def test_a_linear_layer_that_writes_its_product_itself_gets_a_bias() -> None:
    model = made(
        "FalconForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    result = rewrite.convert(model, "fold")
    assert result.report.ok
    assert "transformer.h.0.input_layernorm" in {c.target for c in result.report.changes}
    layer = result.model.get_submodule("transformer.h.0.self_attention.query_key_value")
    assert type(layer).__name__ == "FalconLinear" and bool(layer.bias.any())
