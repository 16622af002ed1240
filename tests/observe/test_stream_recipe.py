"""A stream that one model was put through a map is put through it in other checkpoints, too."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm, RotateStream
from rewrite.cli.main import main
from rewrite.errors import CheckpointError
from rewrite.fold.executor import run_recipes
from rewrite.fold.recipes import from_data
from rewrite.fold.replay import apply_report
from rewrite.fold.store import StateDictStore
from rewrite.observe.stream_recipe import StreamRecipe
from tests.streams.blocks import PreNorm, draw, error

X = torch.randn(2, 5, 16, dtype=torch.float64)


def retrained(model: nn.Module) -> nn.Module:
    """Return a model of the same architecture with other numbers."""
    generator = torch.Generator().manual_seed(1)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = drawn - 0.25 if parameter.ndim > 1 else drawn + 0.25
    return other


def reported(model: nn.Module, *passes: Any) -> tuple[nn.Module, dict[str, Any]]:
    result = rewrite.convert(model, list(passes), example_inputs=X)
    assert all(part.changes for part in result.report.passes)
    return result.model, json.loads(result.report.to_json())


CHAINS = [
    (nn.RMSNorm, [FoldNorm(), RotateStream(seed=3)]),
    (nn.LayerNorm, [LayerNormToRMSNorm()]),
    (nn.LayerNorm, [FoldNorm(), LayerNormToRMSNorm(), RotateStream(kind="orthogonal")]),
]


@pytest.mark.parametrize(("norm", "passes"), CHAINS)
def test_a_report_is_replayed_on_another_checkpoint(norm: type[nn.Module], passes: Any) -> None:
    made, report = reported(draw(PreNorm(norm)), *passes)
    other = retrained(draw(PreNorm(norm)))
    made.load_state_dict(apply_report(report, other.state_dict()))
    assert error(other, made, X) < 1e-12


def test_a_module_that_was_put_in_moves_the_keys_of_the_one_before_it() -> None:
    model = draw(PreNorm(embedding_norm=True))
    made, report = reported(model, LayerNormToRMSNorm(centre=True))
    other = retrained(model)
    state = apply_report(report, other.state_dict())
    assert "first.0.weight" in state and "first.weight" not in state
    made.load_state_dict(state)
    assert error(other, made, X) < 1e-12


def test_one_edit_left_out_is_wrong() -> None:
    """The negative twin."""
    made, report = reported(draw(PreNorm(nn.RMSNorm)), FoldNorm(), RotateStream())
    other = retrained(draw(PreNorm(nn.RMSNorm)))
    report["passes"][1]["changes"][0]["recipe"]["edits"].pop()
    made.load_state_dict(apply_report(report, other.state_dict()))
    assert error(other, made, X) > 1e-3


def test_a_bias_that_was_zero_and_went_has_to_be_zero_elsewhere() -> None:
    model = draw(PreNorm())
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    made, report = reported(model, LayerNormToRMSNorm())
    assert "norm.bias" not in made.state_dict()
    made.load_state_dict(apply_report(report, model.state_dict()))
    assert error(model, made, X) < 1e-12
    with pytest.raises(CheckpointError, match=r"norm\d?\.bias is not 0 everywhere"):
        apply_report(report, retrained(model).state_dict())


def test_a_weight_that_was_one_has_to_be_one_elsewhere() -> None:
    model = draw(PreNorm(nn.RMSNorm))
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    _, report = reported(model, RotateStream())
    with pytest.raises(CheckpointError, match="is not 1 everywhere: fold the norm first"):
        apply_report(report, retrained(model).state_dict())


def test_the_command_replays_it(tmp_path: Any) -> None:
    made, report = reported(draw(PreNorm(nn.RMSNorm)), FoldNorm(), RotateStream())
    other = retrained(draw(PreNorm(nn.RMSNorm)))
    (tmp_path / "map.json").write_text(json.dumps(report), encoding="utf-8")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    paths = [str(tmp_path / name) for name in ("map.json", "other.pt", "out.pt")]
    assert main(["apply-map", *paths]) == 0
    made.load_state_dict(torch.load(tmp_path / "out.pt"))
    assert error(other, made, X) < 1e-12


def recipe(**changed: Any) -> StreamRecipe:
    edit = {"tensor": "w", "axis": -1, "scale": None, "alone": False, "aliases": []}
    data = {
        "do": "map-stream", "map": {"kind": "centre", "size": 4}, "edits": [edit],
        "norms": ["n"], "ones": [], "needs": {},
    }  # fmt: skip
    found = from_data({**data, **changed})
    assert isinstance(found, StreamRecipe)
    return found


def test_it_is_the_same_as_data_and_back() -> None:
    first = recipe()
    assert recipe(**json.loads(json.dumps(first.to_data()))).to_data() == first.to_data()


def test_what_is_not_finite_is_not_written() -> None:
    store = StateDictStore({"w": torch.full((2, 4), float("inf"))})
    with pytest.raises(CheckpointError, match="w would hold values that are not finite"):
        run_recipes([recipe()], store)


def test_a_recipe_without_its_edits_is_damaged() -> None:
    with pytest.raises(CheckpointError, match="incomplete"):
        from_data({"do": "map-stream", "map": {"kind": "centre", "size": 4}})
