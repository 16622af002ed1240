"""Signal propagation against numbers known by hand, and the Jacobian against its matrix."""

import math

import pytest
import torch
from torch import nn

import models
from rewrite.errors import VerificationError
from rewrite.signals.measure import signal


def chain(width: int = 40) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def test_statistics_of_a_small_network():
    model = chain().double()
    x = torch.randn(16, 40, dtype=torch.float64)
    gradient = torch.randn(16, 3, dtype=torch.float64)
    found = signal(model, x, loss=lambda out: (out * gradient).sum())
    z = (x @ model[0].weight.T + model[0].bias).detach().requires_grad_()
    a = z.tanh()
    out = a @ model[2].weight.T + model[2].bias
    (out * gradient).sum().backward()
    first, act, last = found.rows
    assert [r.kind for r in found.rows] == ["linear", "tanh", "linear"]
    assert [r.name for r in found.rows] == ["0", "1", "2"]
    assert first.std == pytest.approx(z.std(correction=0).item(), rel=1e-12)
    assert act.mean == pytest.approx(a.mean().item(), abs=1e-12)
    assert first.grad_std == pytest.approx(z.grad.std(correction=0).item(), rel=1e-12)
    weight_gradient = gradient.T @ a
    assert last.weight_grad_std == pytest.approx(
        weight_gradient.std(correction=0).item(), rel=1e-12
    )
    assert last.grad_std == pytest.approx(gradient.std(correction=0).item(), rel=1e-12)
    assert [r.name for r in found.layers] == ["0", "2"]
    assert [r.name for r in found.activations] == ["1"]


def test_saturated_and_dead_units():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0])))
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([0.0, 0.5, 4.0, -9.0]))
    relu, tanh = signal(model, torch.rand(10, 4) + 0.1).activations
    assert (relu.saturated, relu.dead) == (0.5, 0.5)
    assert (tanh.saturated, tanh.dead) == (0.5, 0.5)
    relu, _ = signal(model, torch.tensor([[1.0, 1, 1, 1], [-1.0, 1, 1, 1]])).activations
    assert (relu.saturated, relu.dead) == (0.625, 0.5)


def test_dead_channels_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(inplace=True))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1, 1))
    (row,) = signal(model, torch.rand(2, 1, 5, 7) + 0.1).activations
    assert row.dead == pytest.approx(2 / 3)
    (layer,) = signal(model, torch.ones(2, 1, 5, 7)).layers
    # The output is measured before the in-place ReLU writes over it.
    assert layer.mean == pytest.approx(-1 / 3)


def test_the_model_is_left_as_it_was():
    model, inputs = models.build("residual")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    signal(model, inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name",
    ["branching_root", "functional_conv", "functional_norm", "transformer", "tied_embedding"],
)
def test_models_that_are_no_plain_chains(name):
    model, inputs = models.build(name)
    found = signal(model, inputs)
    assert found.layers
    assert all(math.isfinite(row.std) for row in found.rows)
    assert any(row.grad_std for row in found.rows)


def test_vanishing_gradients_show():
    deep = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(64, 64), nn.Tanh())])
    rows = signal(deep, torch.randn(32, 64)).layers
    gradients = [row.grad_std for row in rows]
    assert gradients == sorted(gradients)
    assert gradients[0] < 1e-2 * gradients[-1]


def test_what_has_no_signal():
    with pytest.raises(VerificationError, match="does not run"):
        signal(chain(), torch.randn(4, 7))

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(3)

    with pytest.raises(VerificationError, match="depends on"):
        signal(Constant(), torch.randn(4, 7))
