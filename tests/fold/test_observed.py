"""A norm whose readers observed calls show: the recipe, the tensors it writes, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from passes import FoldNorm
from rewrite.fold.observed import untie_config, write_tensor
from rewrite.graph.capture import capture
from rewrite.outcomes import Change
from tests.observe.blocks import WIDTH, Decoder, RMSNorm, randomized, tokens


def folded(model: nn.Module) -> Any:
    result = rewrite.convert(model, FoldNorm(), example_inputs=(tokens(),))
    with torch.no_grad():
        want, made = model(tokens()), result.model(tokens())
    assert (made - want).abs().max() < 1e-12 * want.abs().max()
    return result


def change_of(result: Any, target: str) -> Change:
    return next(change for change in result.report.changes if change.target == target)


def test_the_affine_part_goes_into_all_readers_and_the_norm_keeps_none() -> None:
    model = randomized(Decoder(lambda: nn.LayerNorm(WIDTH)))
    result = folded(model)
    change = change_of(result, "norm")
    assert change.after == "its affine part folded into head"
    assert list(result.model.norm.parameters()) == []
    assert change.keys == {"norm.weight": None, "norm.bias": None}
    assert change.recipe["do"] == "fold-observed" and set(change.touched) >= {"head"}
    gamma, beta = model.norm.weight, model.norm.bias
    torch.testing.assert_close(result.model.head.weight, model.head.weight * gamma)
    torch.testing.assert_close(result.model.head.bias, model.head.weight @ beta)


def test_a_norm_whose_class_needs_a_weight_stays_with_ones_and_says_so() -> None:
    model = randomized(Decoder(RMSNorm))
    result = folded(model)
    change = change_of(result, "norm")
    assert (result.model.norm.weight == 1).all() and change.keys == {}
    assert "its class needs a weight: it stays, and does nothing" in change.note
    assert (model.norm.weight - 1).abs().max() > 1e-3, "the model itself is not touched"
    torch.testing.assert_close(result.model.head.weight, model.head.weight * model.norm.weight)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("alone", [True, False])
def test_a_tensor_of_several_modules_is_written_in_all_of_them_or_in_one(alone: bool) -> None:
    model = tied()
    before = model[0].weight.detach().clone()
    write_tensor(capture(model), "1.weight", torch.full((4, 4), 2.0), alone)
    assert (model[1].weight == 2).all()
    assert (model[0].weight is model[1].weight) is not alone
    assert torch.equal(model[0].weight, before) is alone


def test_a_configuration_is_told_that_its_head_is_untied() -> None:
    class Part:
        tie_word_embeddings = True

    class Config(Part):
        text_config = Part()

    model = nn.Module()
    untie_config(model)
    model.config = Config()
    untie_config(model)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
