"""Original and result beside each other: post-norm blocks, encoder-decoders, and what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rewrite
from models.randomize import randomize_norms_
from rewrite.errors import CheckpointError
from rewrite.observe.recipe import ReaderRecipe
from rewrite.sharded import recipes as module
from rewrite.sharded.proof import _comparable
from tests.observe.test_transformers import SIZES, made
from tests.sharded.conftest import transformers

pytestmark = pytest.mark.filterwarnings("ignore")

BERT = {**SIZES, "max_position_embeddings": 32}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    made("BertForMaskedLM", **BERT).float().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_the_last_norm_of_a_post_norm_stream_is_compared_in_the_output(bert: Path) -> None:
    """It goes into the head: its block returns another value, rightly."""
    report = rewrite.convert_checkpoint(bert, bert.with_name("out"), "fold")
    assert [change.target for change in report.changes] == ["bert.encoder.layer.1.output.LayerNorm"]
    assert report.verification is not None and report.verification.max_rel < 1e-12
    assert [case.name for case in report.verification.cases] == ["bert.encoder.layer.0", "output"]
    assert any(note.endswith("moved: bert.encoder.layer.1") for note in report.notes)
    assert any("padded mask, batch 2" in note for note in report.notes), report.notes


def test_a_wrong_recipe_at_a_border_is_found_in_the_output(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.run_recipes

    def wrong(recipes: Any, store: Any, exact: Any) -> None:
        real([replace(recipe, factor=recipe.factor * 1.001) for recipe in recipes], store, exact)

    monkeypatch.setattr(module, "run_recipes", wrong)
    with pytest.raises(rewrite.ContractError, match="output is off by"):
        rewrite.convert_checkpoint(bert, bert.with_name("out"), "fold")
    assert not bert.with_name("out").exists()


def test_an_encoder_decoder_is_run_with_both_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    made("T5ForConditionalGeneration", **T5).float().save_pretrained(folder)
    report = rewrite.convert_checkpoint(folder, tmp_path / "out", "fold")
    assert report.changes and report.verification is not None
    names = {case.name for case in report.verification.cases}
    assert names == {"encoder.block.0", "decoder.block.0", "output"}
    assert report.verification.max_rel < 1e-12
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert rewrite.verify(rewrite.load(folder), again, level="quick").ok


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 16}


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_model_that_compares_text_with_images_is_run_with_both(tmp_path: Path, kind: str) -> None:
    """SigLIP's pooling reads the weight of a projection that it never calls."""
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=VISION)
    model = randomize_norms_(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path / "both")
    report = rewrite.convert_checkpoint(tmp_path / "both", tmp_path / "out", "fold")
    assert report.verification is not None and report.verification.max_rel < 1e-12
    names = [case.name for case in report.verification.cases]
    assert len(names) == 3 and any("vision" in name for name in names), names
    assert not any("as stored only" in note for note in report.notes), report.notes


def test_what_the_call_of_the_proof_does_not_run_is_named(tmp_path: Path) -> None:
    """A text without an image leaves the vision tower of a chat model alone."""
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=60,
    )
    model = randomize_norms_(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "llava")
    report = rewrite.convert_checkpoint(tmp_path / "llava", tmp_path / "out", "fold")
    assert report.verification is not None and report.verification.max_rel < 1e-12
    changed = [change.target for change in report.changes]
    assert any("vision" in name for name in changed) and any("language" in n for n in changed)
    (note,) = (note for note in report.notes if "as stored only" in note)
    assert "vision_tower" in note and "language" not in note and "input_ids" in note


def test_nothing_but_nan_is_no_proof(bert: Path) -> None:
    config = bert / "config.json"
    config.write_text(
        config.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": NaN')
    )
    assert "NaN" in config.read_text()
    with pytest.raises(CheckpointError, match="returns NaN alone"):
        rewrite.convert_checkpoint(bert, bert.with_name("out"), "fold")
    assert not bert.with_name("out").exists()
    assert rewrite.convert_checkpoint(bert, bert.with_name("out"), "fold", verify=False).changes


def recipe(weight: str, *readers: str) -> ReaderRecipe:
    edits = tuple({"weight": f"{reader}.weight"} for reader in readers)
    return ReaderRecipe(f"{weight}.weight", 1.0, 0.0, None, edits, {}, ())


@pytest.mark.parametrize(
    ("given", "apart"),
    [
        (recipe("layers.1.norm", "layers.1.q", "layers.1.k"), []),
        (recipe("norm", "head"), []),
        (recipe("layers.1.norm", "head"), ["layers.1"]),
        (recipe("layers.1.norm", "layers.1.q", "layers.2.q"), ["layers.1", "layers.2"]),
        (recipe("norm", "layers.10.q"), ["layers.10"]),
    ],
)
def test_a_block_is_compared_unless_a_norm_moved_over_its_border(
    given: ReaderRecipe, apart: list[str]
) -> None:
    blocks = [f"layers.{number}" for number in (0, 1, 2, 10)]
    assert _comparable(blocks, [given]) == ([b for b in blocks if b not in apart], apart)
