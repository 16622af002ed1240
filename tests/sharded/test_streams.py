"""Streams of folders: turned tensor by tensor, proved in the new basis, or declined in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm, RotateStream
from rewrite.cli.main import main
from rewrite.errors import OptionError
from rewrite.fold.undo import undo_report
from rewrite.observe.stream_recipe import StreamRecipe
from tests.sharded.conftest import Make, logits, relative
from tests.sharded.test_configuration import hidden, vision

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_fold_and_turn_are_proved_and_open_in_transformers(name: str, make: Make) -> None:
    source = make(name)
    target = source.with_name("out")
    passes = [FoldNorm(untie=True), RotateStream(seed=1)]
    report = rewrite.convert_checkpoint(source, target, passes)
    assert [len(part.changes) for part in report.passes] == [5, 1]
    assert report.verification is not None and report.verification.max_rel < 1e-11
    assert relative(logits(source), logits(target)) < 1e-5


def test_a_tensor_that_was_not_turned_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: one edit of the recipe is lost, and the proof says so."""
    from rewrite.sharded import recipes

    honest = recipes.run_recipes

    def forgetful(given, store, exact=None):  # type: ignore[no-untyped-def]
        (recipe,) = given
        if not isinstance(recipe, StreamRecipe):
            honest(given, store, exact)
            return
        kept = [e for e in recipe.edits if "0.mlp.down_proj" not in e["tensor"]]
        assert len(kept) < len(recipe.edits)
        honest([replace(recipe, edits=tuple(kept))], store, exact)
        for edit in recipe.edits:
            if edit not in kept:
                store.set(edit["tensor"], store.get(edit["tensor"]))

    monkeypatch.setattr(recipes, "run_recipes", forgetful)
    source = make()
    with pytest.raises(rewrite.ContractError, match=r"layers\.0 is off"):
        rewrite.convert_checkpoint(source, source.with_name("out"), ["fold", "rotate-stream"])
    assert not source.with_name("out").exists()


def test_norms_with_a_weight_are_asked_of_the_shards(make: Make) -> None:
    source = make()
    report = rewrite.convert_checkpoint(source, source.with_name("out"), "rotate-stream")
    assert not report.changes and "fold it first" in report.skips[0].reason
    for file in source.glob("*.safetensors"):
        held = load_file(file)
        ones = {k: torch.ones_like(v) if "norm" in k else v for k, v in held.items()}
        save_file(ones, file, {"format": "pt"})
    assert rewrite.convert_checkpoint(source, source.with_name("out"), "rotate-stream").changes


def test_it_is_bit_identical_to_the_road_in_memory(make: Make) -> None:
    source = make("llama", torch.bfloat16)
    folded, turned = source.with_name("folded"), source.with_name("turned")
    rewrite.convert_checkpoint(source, folded, "fold", verify=False)
    rewrite.convert_checkpoint(folded, turned, "rotate-stream", verify=False)
    model = rewrite.convert(rewrite.load(folded), "rotate-stream", verify=False).model.state_dict()
    written = {k: v for file in turned.glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(written[k], v) for k, v in model.items())


def test_a_class_that_cannot_say_rms_norm_is_declined(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("phi")
    with pytest.raises(OptionError, match="no configuration of PhiFor"):
        rewrite.convert_checkpoint(source, source.with_name("out"), "ln-to-rms")
    out = str(source.with_name("out"))
    capsys.readouterr()
    assert main(["convert", "--ln-to-rms", str(source), "-o", out]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not Path(out).exists()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_folder_is_turned_back_by_its_report_alone(name: str, make: Make) -> None:
    source = make(name)
    folded, turned, back = (source.with_name(n) for n in ("folded", "turned", "back"))
    rewrite.convert_checkpoint(source, folded, FoldNorm(untie=True), verify=False)
    made = rewrite.convert_checkpoint(folded, turned, RotateStream(seed=5), verify=False)
    report = json.loads(made.to_json())
    want = tensors(folded)
    undone = undo_report(report, tensors(turned))
    assert undone.notes == () and undone.state.keys() == want.keys()
    assert max(relative(want[k], undone.state[k]) for k in want) < 1e-6
    # The same by a pass that the report names, folder to folder.
    said = report["passes"][0]["changes"][0]["recipe"]["map"]
    way = RotateStream(kind=said["kind"], seed=said["seed"], inverse=not said["inverse"])
    assert rewrite.convert_checkpoint(turned, back, way).ok
    assert max(relative(want[k], v) for k, v in tensors(back).items()) < 1e-6
    # The negative twin: what was not turned back is another tensor.
    embedded = "model.embed_tokens.weight"
    assert relative(want[embedded], tensors(turned)[embedded]) > 1e-2


def test_a_folder_of_rms_norms_is_one_of_layer_norms_again(tmp_path: Path) -> None:
    source, out = vision(tmp_path / "vision"), tmp_path / "out"
    passes = [FoldNorm(), LayerNormToRMSNorm()]
    report = rewrite.convert_checkpoint(source, out, passes, verify=False)
    undone = undo_report(json.loads(report.to_json()), tensors(out))
    assert any("cannot be brought back" in note for note in undone.notes)
    assert undone.state.keys() >= tensors(source).keys()  # and the biases that fold added
    back = tmp_path / "back"
    back.mkdir()
    save_file(undone.state, back / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (back / "config.json").write_text(json.dumps({**config, "norm_type": "layer_norm"}))
    assert relative(hidden(source), hidden(back)) < 1e-5
