"""Signal propagation against numbers known by hand, and the Jacobian against its matrix."""

import json
import math

import pytest
import torch
from torch import nn

import models
from rewrite.errors import OptionError, VerificationError
from rewrite.signals.jacobian import layer_jacobians
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


def test_jacobian_of_a_small_network_is_exact():
    model = chain().double()
    x = torch.randn(1, 40, dtype=torch.float64)
    (row,) = [r for r in signal(model, x).layers if r.jacobian]
    slope = 1 - model[0](x).tanh() ** 2
    values = torch.linalg.svdvals(model[2].weight * slope)
    assert row.jacobian.source == "0"
    assert row.jacobian.largest == pytest.approx(values[0].item(), rel=1e-12)
    assert row.jacobian.mean == pytest.approx(values.mean().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(400, 700), (700, 400), (500, 500)])
def test_jacobian_of_a_large_layer_by_lanczos(shape):
    columns, rows = shape
    model = nn.Sequential(nn.Linear(5, columns), nn.Tanh(), nn.Linear(columns, rows)).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    (row,) = [r for r in signal(model, x).layers if r.jacobian]
    values = torch.linalg.svdvals(model[2].weight * (1 - model[0](x).tanh() ** 2))
    # From below, and from one random start: a few percent.
    assert row.jacobian.largest == pytest.approx(values[0].item(), rel=0.05)
    assert row.jacobian.largest <= values[0].item() * (1 + 1e-9)
    assert row.jacobian.mean == pytest.approx(values.mean().item(), rel=0.05)
    assert row.jacobian.rms == pytest.approx(values.square().mean().sqrt().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_jacobians_whose_spectrum_is_one_value_or_mostly_zero(dtype):
    """Lanczos ends after one step, or goes on with rounding noise: zeros stay zeros."""
    x = torch.ones(1, 1024, dtype=dtype, requires_grad=True)
    first = x * 2
    twice, some = first * 2, first * (torch.arange(1024) < 64).to(dtype)
    found = layer_jacobians([("a", first), ("b", twice)], [], 0)[1]
    tolerance = 4 * torch.finfo(dtype).eps
    for value in (found.largest, found.rms, found.mean):
        assert value == pytest.approx(2.0, rel=tolerance)
    found = layer_jacobians([("a", first), ("b", some)], [], 0)[1]
    assert found.largest == pytest.approx(1.0, rel=tolerance)
    # One random vector of 1,024 lies in the 64 axes by 1/16, give or take 1/6 of that.
    assert found.mean == pytest.approx(1 / 16, rel=0.5)
    assert found.rms == pytest.approx(1 / 4, rel=0.25)
    assert found.rms**2 == pytest.approx(found.mean, rel=0.02)  # values are 0 or 1


def test_a_dead_branch_has_jacobian_zero():
    x = torch.ones(1, 300, dtype=torch.float64, requires_grad=True)
    first = x * 2
    second = (first * 0).clone()
    notes: list[str] = []
    found = layer_jacobians([("a", first), ("b", second)], notes, 0)
    assert (found[1].largest, found[1].mean, notes) == (0.0, 0.0, [])


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


def test_table_json_and_pictures(tmp_path):
    before = signal(chain(), torch.randn(4, 40))
    after = signal(chain(), 2 * torch.randn(4, 40))
    data = json.loads(after.to_json())
    assert data["rows"][0]["name"] == "0"
    assert "tanh" in str(after)
    for suffix in ("png", "svg"):
        path = after.plot(tmp_path / f"signal.{suffix}", before=before)
        assert path.stat().st_size > 5000
    assert "before" in (tmp_path / "signal.svg").read_text()
    with pytest.raises(OptionError, match=r"\.png or \.svg"):
        after.plot(tmp_path / "signal.gif")


def test_what_has_no_signal():
    with pytest.raises(VerificationError, match="does not run"):
        signal(chain(), torch.randn(4, 7))

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(3)

    with pytest.raises(VerificationError, match="depends on"):
        signal(Constant(), torch.randn(4, 7))
