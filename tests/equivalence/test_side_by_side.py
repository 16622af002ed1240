"""Two models beside each other: a right rewrite is near everywhere, a wrong number is located."""

import copy
import json

import torch
from torch import nn

import models
import rewrite
from rewrite.equivalence.side_by_side import side_by_side
from rewrite.runtime.inputs import Inputs

X = torch.randn(2, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).double()
    models.randomize_norms_(model)
    return model.eval()


def test_a_right_fold_is_near_at_every_module() -> None:
    model = network()
    folded = rewrite.convert(model, "fold", example_inputs=X.double()).model
    found = side_by_side(model, folded, Inputs.of(X.double()))
    errors = {row.name: row.error for row in found.after if row.error is not None}
    assert set(errors) == {"0", "2", "3"} and max(errors.values()) < 1e-13


def test_one_wrong_number_is_off_from_its_module_on() -> None:
    model = network()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[3].weight[2] *= 1.001
    found = side_by_side(model, wrong, Inputs.of(X.double()))
    errors = {row.name: row.error or 0.0 for row in found.after}
    assert max(errors[name] for name in "012") == 0.0
    assert min(errors["3"], errors["4"]) > 1e-5
    assert {row[0] for row in found.different()} == {"3", "4"}
    assert found.summary().startswith("2 of 6 modules differ")


def test_calls_and_readers_come_from_the_run() -> None:
    rows = {
        row.name: row for row in side_by_side(network(), network(), Inputs.of(X.double())).after
    }
    assert rows["0"].calls == {"conv2d": 1} and rows["0"].readers == ("1",)
    assert rows["3"].parameters == 8 * 8 * 9 + 8


def test_without_an_input_nothing_is_run() -> None:
    found = side_by_side(network(), network(), None)
    assert all(row.error is None and row.order is None for row in found.after)
    assert json.loads(found.to_json())["before"][0]["kind"] == "Sequential"


def test_neither_model_changes() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    side_by_side(model, network(), Inputs.of(X.double()))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
