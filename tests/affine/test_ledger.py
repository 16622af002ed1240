"""What a layer has absorbed, on either side, in any order: one tensor, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.affine.algebra import Affine
from rewrite.affine.layers import Layer, Side, layer_of
from rewrite.affine.ledger import Ledger
from rewrite.graph.capture import capture


def affine(channels: int, seed: int) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    return Affine(scale, torch.randn(channels, generator=generator, dtype=torch.float64))


def mapped(x: Tensor, one: Affine) -> Tensor:
    return x * one.scale.view(-1, 1, 1) + one.shift.view(-1, 1, 1)


def ledger_of(module: nn.Module) -> tuple[Ledger, Layer]:
    captured = capture(nn.Sequential(module.eval()))
    node = next(node for node in captured.nodes() if node.op == "call_module")
    layer = layer_of(captured, node, 4)
    assert layer is not None
    return Ledger(captured.tensor), layer


X = torch.randn(2, 3, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_maps_on_both_sides_are_one_kernel(bias: bool) -> None:
    conv = nn.Conv2d(3, 4, 3, bias=bias).double()
    one, two, behind, last = affine(3, 0), affine(3, 1), affine(4, 2), affine(4, 3)
    wanted = mapped(mapped(conv(mapped(mapped(X, two), one)), behind), last)
    ledger, layer = ledger_of(conv)
    ledger.take(layer, Side.INPUT, one)
    ledger.take(layer, Side.OUTPUT, behind)
    ledger.take(layer, Side.INPUT, two)  # next to the value: further out than `one`
    ledger.take(layer, Side.OUTPUT, last)
    new = ledger.new_tensors(layer)
    got = torch.nn.functional.conv2d(X, new["weight"], new["bias"])
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_batch_norm_keeps_its_statistics_and_takes_the_maps_in_gamma_and_beta() -> None:
    norm = nn.BatchNorm2d(3).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    ahead, behind = affine(3, 0), affine(3, 1)
    wanted = mapped(norm(mapped(X, ahead)), behind)
    ledger, layer = ledger_of(norm)
    ledger.take(layer, Side.INPUT, ahead)
    ledger.take(layer, Side.OUTPUT, behind)
    new = ledger.new_tensors(layer)
    got = torch.nn.functional.batch_norm(
        X, norm.running_mean, norm.running_var, new["weight"], new["bias"], eps=norm.eps
    )
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_bias_appears_only_where_something_is_added() -> None:
    ledger, layer = ledger_of(nn.Conv2d(3, 4, 1, bias=False).double())
    ledger.take(layer, Side.OUTPUT, Affine(affine(4, 0).scale, torch.zeros(4).double()))
    assert set(ledger.new_tensors(layer)) == {"weight"}
    ledger.take(layer, Side.OUTPUT, affine(4, 1))
    assert set(ledger.new_tensors(layer)) == {"weight", "bias"}


def test_half_precision_is_rounded_once() -> None:
    conv = nn.Conv2d(3, 4, 1, bias=False).half()
    ledger, layer = ledger_of(conv)
    scale = torch.full((4,), 1 / 3, dtype=torch.float64)
    for _ in range(2):
        ledger.take(layer, Side.OUTPUT, Affine(scale, torch.zeros_like(scale)))
    new = ledger.new_tensors(layer)["weight"]
    assert new.dtype == torch.half
    assert torch.equal(new, (conv.weight.detach().double() / 9).half())
    assert not torch.equal(new, ((conv.weight.detach().double() / 3).half().double() / 3).half())


def test_a_norm_that_is_forgotten_is_written_no_more() -> None:
    ledger, layer = ledger_of(nn.BatchNorm2d(3).double())
    ledger.take(layer, Side.OUTPUT, affine(3, 0))
    assert ledger.layers() == (layer,)
    ledger.forget(layer)
    assert ledger.layers() == ()
