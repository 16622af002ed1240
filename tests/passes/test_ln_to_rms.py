"""`ln-to-rms`: exact on centred streams, declined with the writer's name on all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm
from rewrite.nn import ShiftedRMSNorm
from tests.streams.blocks import Careful, PostNorm, PreNorm, draw, error
from tests.streams.families import untrained

X = torch.randn(2, 5, 16, dtype=torch.float64)


def converted(model: nn.Module, **options: Any) -> rewrite.Result[nn.Module]:
    return rewrite.convert(model, LayerNormToRMSNorm(**options), example_inputs=X)


def norms(model: nn.Module) -> set[str]:
    kinds = (nn.LayerNorm, nn.RMSNorm, ShiftedRMSNorm)
    return {type(m).__name__ for m in model.modules() if isinstance(m, kinds)}


def test_rewrites_a_pre_norm_stream_and_carries_weight_and_bias() -> None:
    model = draw(PreNorm())
    result = converted(model)
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


def test_one_writer_left_out_is_wrong() -> None:
    """The negative twin: a bias that is not centred is an error of more than 1e-3."""
    model = draw(PreNorm())
    result = converted(model)
    wrong = result.model
    wrong.blocks[0].mlp[2].bias = model.blocks[0].mlp[2].bias  # type: ignore[index,union-attr]
    assert error(model, wrong, X) > 1e-3


def test_a_layer_scale_is_taken_up_by_its_writer() -> None:
    model = draw(PreNorm(scale=True))
    result = converted(model)
    assert len(result.report.changes) == 1
    assert error(model, result.model, X) < 1e-13
    assert torch.equal(result.model.blocks[0].gamma, torch.ones(16, dtype=torch.float64))  # type: ignore[union-attr,index]


def test_declines_a_post_norm_stream_with_the_norm_that_writes_to_it() -> None:
    report = converted(draw(PostNorm())).report
    assert not report.changes
    assert {"blocks.0.norm1", "blocks.1.norm1"} <= {skip.target for skip in report.skips}
    written = [skip.reason for skip in report.skips if "written by layer_norm" in skip.reason]
    assert len(written) == 3


def test_declines_an_activation_that_writes_to_it() -> None:
    (skip,) = converted(draw(PreNorm(activation=True))).report.skips
    assert "written by gelu" in skip.reason


def test_declines_a_stream_that_is_read_without_a_norm() -> None:
    (skip,) = converted(draw(PreNorm(raw=True))).report.skips
    assert "head" in skip.reason and "no LayerNorm" in skip.reason


def test_declines_a_stream_that_is_returned() -> None:
    (skip,) = converted(draw(PreNorm(returns=True))).report.skips
    assert "the model returns it" in skip.reason


def test_declines_a_norm_of_its_own_code() -> None:
    class Own(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    (skip,) = converted(draw(PreNorm(norm=Own))).report.skips
    assert "Own" in skip.reason or "no LayerNorm" in skip.reason


def test_declines_a_norm_whose_tensors_its_block_reads() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 24, norm_first=True, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), block, nn.LayerNorm(16), nn.Linear(16, 4))
    (skip,) = converted(draw(model)).report.skips
    assert "reads the tensors of 1.norm1 itself" in skip.reason


def test_declines_code_that_no_call_took() -> None:
    (skip,) = converted(draw(PreNorm(block=Careful))).report.skips
    assert "no call took it" in skip.reason


def test_a_writer_that_another_value_shares_is_declined() -> None:
    (skip,) = converted(draw(PreNorm(shared=True))).report.skips
    assert "also read by" in skip.reason


def test_leaves_the_rest_alone() -> None:
    model = draw(PreNorm())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    converted(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    plain = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).double()
    report = converted(plain).report
    assert not report.changes and not report.skips  # no stream: nothing is added to anything


def test_in_training_mode_nothing_is_promised_and_the_mode_stays() -> None:
    model = draw(PreNorm()).train()
    assert converted(model).model.training


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
