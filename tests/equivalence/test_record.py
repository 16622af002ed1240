"""Records of a forward: sketches of values, and values that are written in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.equivalence.divergence import recorded
from rewrite.equivalence.record import Known, Sketcher, record
from rewrite.runtime.inputs import Inputs
from tests.equivalence.networks import Branches


def test_a_sketch_estimates_the_distance_and_finds_a_value_among_others():
    sketch = Sketcher()
    values = [torch.randn(2, 3, 50, 50, dtype=torch.float64) for _ in range(4)]
    known = Known([sketch(value) for value in values])
    moved = values[2] + 1e-6 * torch.randn_like(values[2])
    far = known.nearest(sketch(moved))[0]
    true = float((moved - values[2]).norm() / moved.norm())
    assert true / 2 < far < 2 * true
    assert known.nearest(sketch(values[1]))[0] < 1e-14
    assert known.nearest(sketch(torch.zeros(7)))[0] == float("inf")


def test_values_written_in_place_are_followed():
    class InPlace(nn.Module):
        def forward(self, x):
            out = torch.zeros_like(x)
            out[:, 0] = x[:, 0] * 2
            return out.add_(1)

    sketch = Sketcher()
    run, output = record(InPlace(), (torch.ones(1, 2, 3),), {}, sketch)
    assert len(run.outputs) == 1
    assert run.values[run.outputs[0]].distance(sketch(output)) == 0
    assert [event.function for event in run.events][-1] == "add_"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_recorder_looks_into_branches(sign):
    torch.manual_seed(0)
    net, x = Branches().eval(), sign * torch.rand(3, 4)
    record, output = recorded(net, Inputs((x,)), Sketcher())
    linear = net.linear(x)
    assert torch.equal(output, linear.relu() if sign > 0 else linear.tanh())
    functions = [event.function for event in record.events]
    assert ("relu" in functions) == (sign > 0)
    assert ("tanh" in functions) == (sign < 0)
