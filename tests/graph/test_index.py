"""Lookup tables: calls by module, lines by position, tensors by storage, calls from opaque code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite.graph.capture import capture
from rewrite.graph.index import Index, storage_of
from rewrite.graph.refs import TensorRef


def index_of(model: nn.Module) -> Index:
    captured = capture(model)
    return Index(captured.tree, captured.regions, captured.opaque)


class Twice(nn.Module):
    """One line that runs twice, and two lines that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def step(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.step(self.fc(self.step(x))))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Twice()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(x))


def test_calls_of_a_module_are_found_in_the_order_in_which_they_run() -> None:
    index = index_of(Twice())
    assert [node.name for node in index.calls["fc"]] == ["fc", "fc_1"]


def test_a_line_that_runs_at_each_call_of_its_module_has_all_its_nodes_at_one_position() -> None:
    index = index_of(Outer())
    relus = [node for node in index.positions if node.target is torch.relu]
    assert len(relus) == 4
    first, second, *again = relus
    assert index.positions[first] == ("part", torch.relu, 0)
    assert index.positions[second] == ("part", torch.relu, 1)
    assert index.lines[index.positions[first]] == [first, again[0]]
    assert index.lines[index.positions[second]] == [second, again[1]]


def test_each_graph_knows_its_region() -> None:
    index = index_of(Outer())
    (region,) = index.regions
    assert index.region_of_graph[region.graph] is region and index.roots == frozenset()


def test_tensors_in_one_storage_are_held_together_and_others_are_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].bias = nn.Parameter(model[0].weight[0])
    shared = index_of(model).shared
    assert shared == {
        storage_of(model[0].weight): [TensorRef("0", "weight"), TensorRef("1", "bias")]
    }
    assert not index_of(nn.Sequential(nn.Linear(4, 4))).shared


def test_storages_of_tensors_without_one_are_told_apart() -> None:
    one, other = torch.empty(2, device="meta"), torch.empty(2, device="meta")
    assert storage_of(one) == storage_of(one) != storage_of(other)
    full = torch.randn(4, 4)
    assert storage_of(full) == storage_of(full.T) != storage_of(full.clone())


class Opaque(nn.Module):
    """Spells `deep`, mentions `prose` in a docstring only, and `built` in `__init__` only."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.deep, self.block.prose = nn.Linear(2, 2), nn.Linear(2, 2)
        self.block.built = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Not through prose."""
        return self.block.deep(x) if x.sum() > 0 else x


def test_opaque_code_may_call_what_it_spells_and_nothing_else() -> None:
    index = index_of(Opaque())
    called = index.opaque_caller("block.deep")
    assert called is not None and called.startswith("the model is opaque and may call block.deep")
    assert "test_index.py" in called
    assert index.opaque_caller("block.prose") is None
    assert index.opaque_caller("block.built") is None


def test_opaque_code_may_always_call_its_own_children_and_their_items() -> None:
    model = Opaque()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    index = index_of(model)
    assert index.opaque_caller("block") is not None
    assert index.opaque_caller("layers.1") is not None


def test_the_innermost_opaque_module_around_a_place_is_named_with_its_reason() -> None:
    index = index_of(nn.Sequential(Opaque(), nn.Linear(2, 2)))
    around = index.opaque_around("0.block.deep")
    assert around is not None and around.startswith("0 is opaque (TraceError")
    assert index.opaque_around("1") is None
