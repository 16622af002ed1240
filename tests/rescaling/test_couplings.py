"""The edges between scales: squared weights by unit, and what a rescaling makes of them."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.graph.capture import capture
from rewrite.rescaling.couplings import Coupling, couplings
from rewrite.rescaling.plan import measure_of
from rewrite.rescaling.scales import Scales


def edges(model: nn.Module) -> dict[str, Coupling]:
    captured = capture(model, torch.zeros(1, 3, dtype=torch.float64))
    found = couplings(Scales(captured), measure_of(captured, "l2"), largest=False, biases=False)
    return {edge.name: edge for edge in found}


def test_a_matrix_holds_the_squares_and_moves_with_the_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    before = edges(model)
    assert torch.allclose(before["2"].matrix[0], model[2].weight.detach() ** 2)
    assert (before["0"].reads == -1).all() and (before["2"].writes == -1).all()
    assert torch.equal(before["0"].writes, before["2"].reads)
    d = torch.tensor([0.5, 2.0, 3.0, 4.0], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(d[:, None])
        model[2].weight.div_(d)
    after = edges(model)
    total = before["0"].matrix[0].sum(1)
    assert torch.allclose(after["0"].matrix[0].sum(1), total * d**2)
    assert not torch.allclose(after["0"].matrix[0].sum(1), total * d, rtol=1e-3)
    assert torch.allclose(after["2"].matrix[0], before["2"].matrix[0] / d**2)
