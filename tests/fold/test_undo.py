"""Streams brought back from a state dict and the JSON of a report, and what cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm, RotateStream
from rewrite.cli.main import main
from rewrite.errors import CheckpointError
from rewrite.fold.undo import undo_report
from tests.streams.blocks import PreNorm, draw, error

X = torch.randn(2, 5, 16, dtype=torch.float64)
TURN = RotateStream(kind="orthogonal", seed=11)


def converted(model: nn.Module, *passes: Any) -> tuple[Any, nn.Module]:
    result = rewrite.convert(model, list(passes), example_inputs=X)
    assert all(part.changes for part in result.report.passes)
    return json.loads(result.report.to_json()), result.model


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[key] - want[key]).abs().max()) for key in want)


def folded() -> nn.Module:
    return converted(draw(PreNorm(nn.RMSNorm)), FoldNorm())[1]


@pytest.mark.parametrize("pass_", [TURN, RotateStream(seed=3, inverse=True)])
def test_a_turned_stream_is_turned_back(pass_: RotateStream) -> None:
    model = folded()
    report, turned = converted(model, pass_)
    undone = undo_report(report, turned.state_dict())
    assert undone.notes == () and off(undone.state, model.state_dict()) < 1e-13
    # The negative twin: another seed is another matrix.
    report["passes"][0]["changes"][0]["recipe"]["map"]["seed"] += 1
    assert off(undo_report(report, turned.state_dict()).state, model.state_dict()) > 1e-3


def test_centring_is_undone_for_the_layer_norms_and_what_it_took_is_said() -> None:
    model = draw(PreNorm())
    report, made = converted(
        model,
        LayerNormToRMSNorm(),
    )
    (note,) = undo_report(report, made.state_dict()).notes
    assert "cannot be brought back" in note
    back = copy.deepcopy(model)
    back.load_state_dict(undo_report(report, made.state_dict()).state)
    assert error(model, back, X) < 1e-13


def test_fold_centring_and_turn_are_undone_back_to_the_fold() -> None:
    model = draw(PreNorm())
    report, made = converted(model, FoldNorm(), LayerNormToRMSNorm(), TURN)
    undone = undo_report(report, made.state_dict())
    assert "what fold did stays" in undone.notes[-1]
    _, original = converted(model, FoldNorm())
    _, centred = converted(original, LayerNormToRMSNorm())
    held = centred.state_dict()
    assert max(float((undone.state[k] - held[k]).abs().max()) for k in held) < 1e-13
    back = copy.deepcopy(original)
    back.load_state_dict(undone.state)
    assert error(model, back, X) < 1e-12
    # The negative twin: without undoing, the tensors do not fit the original's LayerNorms.
    wrong = copy.deepcopy(original)
    wrong.load_state_dict({**undone.state, **made.state_dict()}, strict=False)
    assert error(model, wrong, X) > 1e-3


def test_a_bias_of_zeros_that_centring_let_go_is_there_again() -> None:
    model = draw(PreNorm())
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    report, made = converted(model, LayerNormToRMSNorm())
    lost = model.state_dict().keys() - made.state_dict().keys()
    assert lost and all(name.endswith("bias") for name in lost)
    undone = undo_report(report, made.state_dict())
    assert undone.state.keys() == model.state_dict().keys()
    assert all(not undone.state[name].any() for name in lost)


def test_a_layer_scale_stays_in_its_writer_and_is_named() -> None:
    model = draw(PreNorm(nn.RMSNorm, scale=True))
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    report, turned = converted(model, TURN)
    undone = undo_report(report, turned.state_dict())
    (note,) = undone.notes
    assert "gamma" in note and "in their writers" in note
    back = copy.deepcopy(model)
    back.load_state_dict(undone.state)
    assert error(model, back, X) < 1e-12


def spoiled(report: Any) -> Any:
    del report["passes"][0]["changes"][0]["recipe"]["map"]
    return report


def test_what_leaves_no_way_back_is_refused_by_name() -> None:
    report, made = converted(draw(PreNorm()), FoldNorm())
    with pytest.raises(CheckpointError, match="fold leaves no way back"):
        undo_report(report, made.state_dict())
    with pytest.raises(CheckpointError, match="nothing to undo"):
        undo_report({"passes": []}, {})


def test_a_damaged_report_and_another_checkpoint_are_refused() -> None:
    report, turned = converted(folded(), TURN)
    state = turned.state_dict()
    edited = report["passes"][0]["changes"][0]["recipe"]["edits"][0]["tensor"]
    with pytest.raises(CheckpointError, match="of another model"):
        undo_report(report, {**state, edited: torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=f"has no {edited}"):
        undo_report(report, {k: v for k, v in state.items() if k != edited})
    with pytest.raises(CheckpointError, match="does not say how to undo: 'map'"):
        undo_report(spoiled(report), state)


def test_the_command_undoes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folded()
    report, turned = converted(model, TURN)
    (tmp_path / "report.json").write_text(json.dumps(report))
    save_file(
        {k: v.contiguous() for k, v in turned.state_dict().items()}, tmp_path / "a.safetensors"
    )
    files = [str(tmp_path / name) for name in ("report.json", "a.safetensors", "b.safetensors")]
    assert main(["apply-map", "--undo", *files]) == 0
    assert off(load_file(files[2]), model.state_dict()) < 1e-13
    (tmp_path / "report.json").write_text('{"passes": []}')
    assert main(["apply-map", "--undo", *files, "--force"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
