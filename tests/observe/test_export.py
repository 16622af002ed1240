"""One example call as a graph: which module made each node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.observe.export import export_call
from rewrite.observe.spellings import op_name
from rewrite.runtime.inputs import ExampleCall, Inputs


class Sliced(nn.Module):
    """Calls some of its layers through a slice of their list."""

    def __init__(self, cut: slice) -> None:
        super().__init__()
        self.cut = cut
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[self.cut]:
            for layer in block[:1]:
                x = layer(x)
        return x


@pytest.mark.parametrize(
    ("cut", "places"),
    [
        (slice(1, None), [1, 2, 3, 4]),
        (slice(None, 2), [0, 1]),
        (slice(-2, None), [3, 4]),
        (slice(0, 5, 2), [0, 2, 4]),
    ],
)
def test_an_item_of_a_slice_has_its_own_name(cut: slice, places: list[int]) -> None:
    observed = export_call(Sliced(cut), ExampleCall("one", Inputs((torch.zeros(1, 4),))))
    made = [observed.owner(n) for n in observed.graph.nodes if op_name(n) in ("linear", "addmm")]
    assert made == [f"blocks.{place}.0" for place in places]
    assert set(made) <= observed.ran
