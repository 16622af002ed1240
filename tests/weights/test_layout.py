"""How a weight is laid out: outputs, inputs, groups."""

import pytest
import torch

from rewrite.weights.layout import Layout


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_layout_round_trip(groups, inputs_first):
    weight = torch.randn(4, 6, 3, 2)
    layout = Layout(inputs_first, groups)
    units = layout.units(weight)
    assert units.shape[0] == groups
    assert torch.equal(layout.weight(units), weight)
