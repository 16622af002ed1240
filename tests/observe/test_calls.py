"""The calls of a model that came without any: as its users call it, and what it says to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from passes import FoldNorm
from rewrite.cli.main import main
from rewrite.observe.calls import default_calls

from .test_transformers import SIZES, made

pytestmark = pytest.mark.filterwarnings("ignore")

T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 20, "pad_token_id": 0,
    "max_target_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


def calls_of(name: str, **config: Any) -> dict[str, dict[str, Any]]:
    return {each.name: each.inputs.kwargs for each in default_calls(made(name, **config))}


def test_a_generation_model_is_called_with_a_padded_mask_in_a_batch_and_with_its_cache() -> None:
    calls = calls_of("LlamaForCausalLM", **SIZES)
    assert list(calls) == ["prefill", "padded mask, batch 2", "cache step"]
    assert set(calls["prefill"]) == {"input_ids"}
    padded = calls["padded mask, batch 2"]
    assert padded["input_ids"].shape[0] == 2
    assert padded["attention_mask"].tolist() == [[0] * 3 + [1] * 5, [1] * 8]
    step = calls["cache step"]
    assert step["input_ids"].shape == (1, 1)
    (cache,) = (value for value in step.values() if hasattr(value, "get_seq_length"))
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize(
    ("name", "config", "first"),
    [
        ("T5ForConditionalGeneration", T5, "input_ids"),
        pytest.param(
            "WhisperForConditionalGeneration", WHISPER, "input_features", marks=pytest.mark.slow
        ),
    ],
)
def test_an_encoder_decoder_gets_both_inputs_in_every_command(
    name: str, config: dict[str, Any], first: str, tmp_path: Any
) -> None:
    model = made(name, **config).float()
    calls = {each.name: each.inputs.kwargs for each in default_calls(model)}
    assert all({first, "decoder_input_ids"} <= set(held) for held in calls.values())
    assert calls["cache step"]["decoder_input_ids"].shape == (1, 1)
    result = rewrite.convert(model, FoldNorm(untie=True))
    checked = result.report.verification
    assert checked is not None and checked.ok
    assert {"cache step", "16 greedy tokens"} <= {case.name for case in checked.cases}
    assert rewrite.verify(model, result.model, level="quick").ok
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert main(["inspect", "--signal", str(folder)]) == 0
    assert main(["verify", str(folder), str(folder), "--quick"]) == 0


class Refusing(nn.Module):
    """A model that says in its configuration what it takes, and takes nothing of the kind."""

    class Config:
        model_type, vocab_size = "own", 20

    config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, graph: Any = None, **kwargs: Any) -> Tensor:
        if graph is None:
            raise ValueError("pass the edges as `graph`")
        return self.head(self.norm(self.embed(input_ids) + graph))


def test_a_model_that_refuses_every_inferred_call_is_reported_with_what_it_said(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Refusing().eval()
    nn.init.normal_(model.norm.weight)
    said = "given input_ids 1x8, the model says: pass the edges as `graph`"
    report = rewrite.convert(model, "fold").report
    (note,) = [note for note in report.notes if note.startswith("no input is known")]
    assert said in note and "nothing was run or compared" in note
    for judged in (rewrite.verify, rewrite.export):
        given = model if judged is rewrite.verify else tmp_path / "model.onnx"
        with pytest.raises(rewrite.RewriteError, match="pass the edges as `graph`") as caught:
            judged(model, given)
        assert "\n" not in str(caught.value)
    ids, graph = torch.arange(6)[None], torch.zeros(1, 6, 8)
    given_call = rewrite.convert(model, "fold", example_calls=[{"input_ids": ids, "graph": graph}])
    assert len(given_call.report.changes) == 1 and given_call.report.ok
