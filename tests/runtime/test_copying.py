"""rewrite.runtime.copying: a copy holds what `copy.deepcopy` would, and nothing of the original."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import models
from rewrite.runtime.copying import copy_model


class Busy(nn.Module):
    """Holds all sorts of things beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
        self.first = self.layers[0]
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.config = {"sizes": [1, 2], "inner": {"deep": deque([1])}, 3: "x"}
        self.again = self.config
        self.order = OrderedDict(a=[1])
        self.parent = (self,)
        self.register_buffer("steps", torch.zeros(1))
        self.hooked = self.first.register_forward_hook(self.note)
        self.module = torch

    def note(self, *_: Any) -> None:
        self.steps += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.first(x))


class Own(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        made = Own(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        made.was_copied = True
        return made


def test_a_copy_is_as_deep_as_deepcopy_makes_it() -> None:
    model = Busy()
    twin = copy_model(model)
    assert vars(twin).keys() == vars(model).keys()
    assert twin.layers[0] is twin.first is not model.first and twin.parent[0] is twin
    assert twin.tied.weight is twin.first.weight is not model.first.weight
    assert twin.config == model.config and twin.again is twin.config is not model.config
    assert twin.config["inner"]["deep"] is not model.config["inner"]["deep"]
    assert twin.order == model.order and twin.order["a"] is not model.order["a"]
    assert twin.module is torch
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), model(x))
    assert twin.steps.item() == model.steps.item() == 1
    twin.eval()
    assert model.training and model.first.training


@pytest.mark.parametrize("name", models.NAMES[:12] if hasattr(models, "NAMES") else ["residual"])
def test_a_copy_has_the_modules_and_attributes_of_a_deep_copy(name: str) -> None:
    model, _ = models.build(name)
    ours, theirs = copy_model(model), copy.deepcopy(model)
    pairs = zip(ours.named_modules(), theirs.named_modules(), strict=True)
    for (name_a, a), (name_b, b) in pairs:
        assert name_a == name_b and type(a) is type(b) and vars(a).keys() == vars(b).keys()
        assert a._forward_hooks is not b._forward_hooks
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_class_that_copies_itself_does_so() -> None:
    model = nn.Sequential(Own(2, 2), symbolic_trace(nn.Sequential(nn.ReLU())))
    twin = copy_model(model)
    assert twin[0].was_copied and torch.equal(twin[0].weight, model[0].weight)
    assert type(twin[1]).__name__ == "GraphModule" and twin[1] is not model[1]
