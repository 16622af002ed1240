"""High biases moved into the next layer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewrite
from models import randomize_norms_
from passes import Rebalance
from rewrite.outcomes import Contract
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model


def high_biases(padding: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1, padding=padding)]
    model = randomize_norms_(nn.Sequential(*layers)).double().eval()
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model[0](x)
        model[1].running_mean.copy_(before.mean((0, 2, 3)))
        model[1].running_var.copy_(before.var((0, 2, 3)))
        model[1].weight.fill_(0.2)
        model[1].bias.copy_(torch.tensor([2.0, 1.0, -1.0, 0.0, 0.5, 0.7, 3.0, -2.0]))
    return model, x


def test_high_biases_go_into_the_next_layer_by_option() -> None:
    model, x = high_biases()
    item = Rebalance(absorb_bias=True)
    assert item.contract is Contract.APPROXIMATE
    result = rewrite.convert(model, [item], example_inputs=(x,))
    assert result.report.changes[0].after == "absorbed by 3"
    with torch.no_grad():
        # Four channels are cut at three deviations: 1 value of 740 each is below.
        moved = ((model(x) - result.model(x)).abs() > 1e-9).double().mean()
        assert 0 < moved < 0.02
        # The channels that pass 3 deviations lose what lies above them; the others keep all.
        lowered = result.model
    high = (model[1].bias.detach() - 0.6).clamp(min=0)
    scale = lowered[1].weight.detach() / 0.2
    torch.testing.assert_close((lowered[1].bias / scale).detach(), (model[1].bias - high).detach())
    again = apply_pass(item, copy_model(result.model), x)
    assert not any("absorbed" in change.after for change in again.changes)


def test_a_bias_is_not_absorbed_through_zero_padding() -> None:
    model, x = high_biases(padding=1)
    applied = apply_pass(Rebalance(absorb_bias=True), copy_model(model), x)
    assert not any("absorbed" in change.after for change in applied.changes)
    assert any(skip.target == "1" and "pads" in skip.reason for skip in applied.skips)


class Bounded(nn.Module):
    """A norm of values that lie within three deviations, a ReLU, and a layer that reads it."""

    def __init__(self, reader: str, pooled: bool) -> None:
        super().__init__()
        self.norm, self.pooled = nn.BatchNorm2d(6), pooled
        self.reader: nn.Module = {
            "conv": lambda: nn.Conv2d(6, 4, 3),
            "grouped": lambda: nn.Conv2d(6, 4, 2, groups=2, bias=False),
            "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
            "linear": lambda: nn.Linear(6 * 16, 3),
            "two": lambda: nn.ModuleList([nn.Conv2d(6, 2, 1), nn.Conv2d(6, 5, 3)]),
        }[reader]()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(x))
        if self.pooled:
            y = torch.max_pool2d(y, 2, 1)
        if isinstance(self.reader, nn.ModuleList):
            return torch.cat([layer(y).flatten(1) for layer in self.reader], 1)
        return self.reader(y.flatten(1) if isinstance(self.reader, nn.Linear) else y)


@settings(max_examples=20)
@given(
    reader=st.sampled_from(["conv", "grouped", "depthwise", "linear", "two"]),
    pooled=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_within_three_deviations_it_is_exact(reader: str, pooled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomize_norms_(Bounded(reader, pooled), seed).double().eval()
    with torch.no_grad():
        model.norm.bias.copy_(3 * torch.randn(6) + 3 * model.norm.weight.abs())
        model.norm.bias[0] = 4 * model.norm.weight[0].abs() + 1  # one of them is high
    spread = (model.norm.running_var + model.norm.eps).sqrt().view(-1, 1, 1)
    mean = model.norm.running_mean.view(-1, 1, 1)
    size = 5 if pooled else 4
    unit = torch.rand(3, 6, size, size, dtype=torch.float64) * 2 - 1
    applied = apply_pass(Rebalance(absorb_bias=True), copy_model(model), mean + spread * unit)
    assert applied.changes[0].target == "norm"
    assert bool((applied.model.norm.bias < model.norm.bias).any())
    for deviations, same in ((2.999, True), (30.0, False)):
        x = mean + deviations * spread * unit
        with torch.no_grad():
            before, after = model(x), applied.model(x)
        error = float((before - after).abs().max() / before.abs().max())
        assert (error < 1e-12) is same
