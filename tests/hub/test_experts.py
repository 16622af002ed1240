"""Experts run by products of batches where a model has any, and nothing else is touched."""

from __future__ import annotations

from torch import nn

from rewrite.hub.experts import plain_experts


class Experts(nn.Module):
    has_gate, is_transposed = True, False


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.chosen = nn.ModuleList(layers), ""

    def set_experts_implementation(self, name: str) -> None:
        self.chosen = name


def test_experts_run_by_products_of_batches() -> None:
    model = Model(nn.Linear(2, 2), Experts())
    assert plain_experts(model) is model and model.chosen == "batched_mm"


def test_what_has_no_experts_or_no_choice_is_left() -> None:
    model = Model(nn.Linear(2, 2))
    assert plain_experts(model) is model and not model.chosen
    other = nn.Sequential(Experts())
    assert plain_experts(other) is other
