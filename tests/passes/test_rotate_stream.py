"""`rotate-stream`: an orthogonal change of basis that nothing outside a stream can see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm, RotateStream
from rewrite.errors import OptionError
from rewrite.observe.stream_matrices import stream_map
from tests.streams.blocks import PreNorm, X, bare, draw, error, rotated
from tests.streams.families import untrained


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rewrites_writers_and_readers(kind: str) -> None:
    model = bare()
    result = rotated(model, kind=kind, seed=3)
    (change,) = result.report.changes
    assert error(model, result.model, X) < 1e-12
    q = stream_map(change.recipe["map"]).matrix()
    assert torch.allclose(result.model.embed.weight, q.T @ model.embed.weight)  # type: ignore[union-attr,operator]
    assert torch.allclose(result.model.head.weight, model.head.weight @ q)  # type: ignore[union-attr,operator]


def test_after_ln_to_rms_a_layer_norm_stream_turns() -> None:
    model = draw(PreNorm(scale=True))
    chain = [FoldNorm(), LayerNormToRMSNorm(), RotateStream()]
    result = rewrite.convert(model, chain, example_inputs=X)
    assert [len(part.changes) for part in result.report.passes][1:] == [1, 1]
    assert error(model, result.model, X) < 1e-12


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="hadamard or orthogonal"):
        RotateStream(kind="walsh")
    with pytest.raises(OptionError, match="seed"):
        RotateStream(seed=-1)


_SMALL = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_llama_turns_on_every_call(tied: bool) -> None:
    model = draw(untrained("LlamaForCausalLM", **_SMALL, tie_word_embeddings=tied))
    if tied:
        model.model.norm.weight.data.fill_(1.0)  # else the head has to be untied for the fold
    result = rewrite.convert(model, ["fold", "rotate-stream"])
    assert result.report.verification is not None
    assert result.report.verification.max_rel < 1e-10
    (change,) = result.report.passes[1].changes
    assert "hidden_states" in change.note
    if tied:
        assert result.model.lm_head.weight is result.model.model.embed_tokens.weight


_VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_OPT = {
    "vocab_size": 48, "hidden_size": 24, "ffn_dim": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "word_embed_proj_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 48, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Qwen3ForCausalLM", {**_SMALL, "head_dim": 12, "tie_word_embeddings": False}),
        # Llama with factors on its stream (and ViT with layer scales, below) is the slow tier's.
        pytest.param(
            "GraniteForCausalLM", {**_SMALL, "tie_word_embeddings": False}, marks=pytest.mark.slow
        ),
        ("OPTForCausalLM", {**_OPT, "tie_word_embeddings": False}),
        ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False}),
        ("MixtralForCausalLM", {**_SMALL, "num_local_experts": 3, "max_position_embeddings": 64}),
        ("ViTForImageClassification", _VISION),
        pytest.param("Dinov2ForImageClassification", _VISION, marks=pytest.mark.slow),
    ],
)
def test_families_turn_on_every_call(name: str, config: dict[str, Any]) -> None:
    model = draw(untrained(name, **config))
    if name.startswith("Mixtral"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    result = rewrite.convert(model, ["fold", "ln-to-rms", "rotate-stream"])
    assert len(result.report.passes[-1].changes) == 1
    assert result.report.verification is not None
    assert result.report.verification.max_rel < 1e-10
