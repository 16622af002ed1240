"""The recipe of an observed fold, run on another checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rewrite.errors import CheckpointError
from rewrite.fold.recipes import from_data
from rewrite.fold.replay import apply_report
from tests.observe.blocks import WIDTH, Decoder, randomized
from tests.observe.folding import folded


def test_a_report_folds_another_checkpoint() -> None:
    from rewrite.fold.replay import apply_recipes

    report = folded(randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))).report
    drop = [key for c in report.changes for key, new in c.keys.items() if new is None]
    other = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)), seed=5)
    state = apply_recipes([c.recipe for c in report.changes], drop, other.state_dict())
    expected = folded(other).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("norm.weight", float("nan"), r"norm: .*norm\.weight holds values that are not finite"),
        ("norm.bias", float("inf"), r"norm: .*norm\.bias holds values that are not finite"),
        ("head.weight", float("nan"), r"head\.bias would hold values that are not finite"),
        ("head.weight", None, r"the checkpoint has no head\.weight"),
    ],
)
def test_another_checkpoint_that_breaks_the_plan_is_refused(
    key: str, value: float | None, reason: str
) -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    report = folded(model).report.to_json()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_report(json.loads(report), state)
    if value is None:
        del state[key]
    else:
        state[key].view(-1)[1] = value
    with pytest.raises(CheckpointError, match=reason):
        apply_report(json.loads(report), state)


def test_a_shift_that_the_plan_did_not_have_is_refused() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    report = json.loads(folded(model).report.to_json())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_report(report, state)
    state["norm.bias"][0] = 0.5
    with pytest.raises(CheckpointError, match=r"norm: .*moves no shift \(norm\.bias is not zero"):
        apply_report(report, state)


def test_an_incomplete_recipe_is_refused() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    recipes = [change.recipe for change in folded(model).report.changes]
    recipe = next(recipe for recipe in recipes if recipe["do"] == "fold-observed")
    assert from_data(recipe).to_data() == recipe
    with pytest.raises(CheckpointError, match="incomplete: 'factor'"):
        from_data({key: value for key, value in recipe.items() if key != "factor"})
