"""A recipe is data: through JSON and back it says the same, and what is incomplete is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_
from passes import FoldNorm
from rewrite.errors import CheckpointError
from rewrite.fold.recipes import AffineRecipe, FoldRecipe, MergeRecipe, from_data


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.relu(self.norm(self.a(x) + x) + self.b(x))


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.rand(4, 1, 1) + 0.5), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * self.scale)


def recipes(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    randomize_norms_(model)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    report = rewrite.convert(model.double().eval(), FoldNorm(**options), example_inputs=x).report
    return [json.loads(json.dumps(change.recipe)) for change in report.changes]


MODELS: dict[str, tuple[Any, dict[str, Any], type]] = {
    "norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), {}, FoldRecipe),
    "constant": (Constant, {}, FoldRecipe),
    "input": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), {"input_norm": "1,2,3,4/1,2,3,4"}, FoldRecipe,
    ),
    "affine": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Softmax(1)), {"leftover": "affine"},
        AffineRecipe,
    ),
    "branches": (Branches, {}, MergeRecipe),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_the_same_after_json(name: str) -> None:
    make, options, kind = MODELS[name]
    data = [one for one in recipes(make(), **options) if one["do"] != "with"]
    made = [from_data(one) for one in data]
    assert any(isinstance(one, kind) for one in made)
    for one, recipe in zip(data, made, strict=True):
        again = json.loads(json.dumps(recipe.to_data()))
        assert again == {key: one[key] for key in again}
        assert not set(one) - set(again) - {"weight_normed"}


def test_a_merge_reads_every_tensor_that_its_branches_are_made_of() -> None:
    (data,) = [one for one in recipes(Branches()) if one["do"] == "merge"]
    recipe = from_data(data)
    assert isinstance(recipe, MergeRecipe)
    assert recipe.reads() >= {"a.weight", "a.bias", "b.weight", "norm.weight", "norm.running_var"}
    assert "b.bias" not in recipe.reads() and not any(t.may_lack_bias for t in recipe.terms)
    old = {key: value for key, value in data.items() if key != "version"}
    made = from_data(old)
    assert isinstance(made, MergeRecipe) and all(t.may_lack_bias for t in made.terms)


def test_the_requirements_of_a_fold_are_read_with_it() -> None:
    (data,) = recipes(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    recipe = from_data(data)
    assert isinstance(recipe, FoldRecipe) and not recipe.requirements.invertible
    assert [layer.name for layer in recipe.layers()] == ["0"]
    data["moves"][0]["part"] = "shift over scale"
    inverse = from_data(data)
    assert isinstance(inverse, FoldRecipe) and inverse.requirements.invertible


@pytest.mark.parametrize("key", ["origin", "moves", "scales", "adds", "needs_positive"])
def test_an_incomplete_recipe_is_refused_by_the_key(key: str) -> None:
    (data,) = recipes(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    del data[key]
    with pytest.raises(CheckpointError, match=f"incomplete: '{key}'"):
        from_data(data)


@pytest.mark.parametrize("data", [{"do": "paint"}, {}, {"do": "fold", "origin": 3}])
def test_what_is_no_recipe_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="recipe"):
        from_data(data)


def test_a_clone_is_refused_since_only_the_model_can_repeat_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.bn(self.conv(x))).mean() + torch.tanh(self.conv(x))

    (data,) = recipes(Shared(), unshare=True)
    with pytest.raises(CheckpointError, match=r"was cloned \(unshare\)"):
        from_data(data)
