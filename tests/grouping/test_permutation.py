from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import Node

import models
from models.digits_resnet import digits_resnet
from rewrite.affine.context import AnalysisContext
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.operators import norm_of
from rewrite.grouping.permutation import Order, order_of
from rewrite.outcomes import Declined


def norms(captured: Captured) -> list[Node]:
    return [node for node in captured.nodes() if norm_of(captured, node) is not None]


def orders(model: nn.Module) -> tuple[Captured, list[Order | Declined]]:
    captured = capture(model)
    around = AnalysisContext(captured, {})
    return captured, [order_of(around, node, ()) for node in norms(captured)]


def assert_exact(model: nn.Module, x: torch.Tensor, least: int = 1) -> None:
    """Every order that can change does so exactly, one after the other."""
    torch.manual_seed(0)
    model = models.randomize_norms_(model.double().eval())
    with torch.no_grad():
        before = model(x.double())
        captured, found = orders(model)
        changed = [order for order in found if isinstance(order, Order)]
        assert len(changed) >= least, [str(order) for order in found]
        state = copy.deepcopy(model.state_dict())
        for order in changed:
            order.apply(captured, torch.randperm(order.channels))
        assert any(not torch.equal(state[key], new) for key, new in model.state_dict().items())
        after = model(x.double())
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


class Inverted(nn.Module):
    """An inverted residual block with squeeze and excitation, and its stream."""

    def __init__(self, width: int = 6, hidden: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.down, self.up = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.project = nn.Conv2d(hidden, width, 1)
        self.bn3 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 4, 5)
        self.act, self.pool = nn.Hardswish(), nn.AdaptiveAvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn0(self.stem(x))
        y = nn.functional.relu6(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.depthwise(y)))
        y = y * torch.sigmoid(self.up(nn.functional.silu(self.down(y.mean((2, 3), keepdim=True)))))
        x = x + self.bn3(self.project(y))
        return self.head(self.pool(x).flatten(1))


def test_hidden_channels_and_the_stream_take_any_order() -> None:
    assert_exact(Inverted(), torch.randn(2, 3, 8, 8), least=4)


def test_the_norms_that_share_an_order_are_named() -> None:
    _, found = orders(Inverted().eval())
    assert all(isinstance(order, Order) for order in found)
    shared = [set(order.norms) for order in found if isinstance(order, Order)]
    assert shared == [{"bn0", "bn3"}, {"bn1", "bn2"}, {"bn1", "bn2"}, {"bn0", "bn3"}]


def test_a_resnet_takes_any_order() -> None:
    assert_exact(digits_resnet(), torch.randn(2, 1, 8, 8), least=3)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_and_transposed_layers_too(dims: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    up = {1: nn.ConvTranspose1d, 3: nn.ConvTranspose3d}[dims]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    pool = {1: nn.MaxPool1d, 3: nn.MaxPool3d}[dims]
    model = nn.Sequential(
        conv(2, 6, 3, padding=1), norm(6), nn.ReLU(), pool(2), up(6, 4, 2, stride=2), norm(4),
        nn.GELU(), conv(4, 2, 1),
    )  # fmt: skip
    assert_exact(model, torch.randn(2, 2, *(6,) * dims), least=2)


class Reads(nn.Module):
    """A convolution and a norm, whose value something else reads."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1, groups=2 if what == "grouped" else 1)
        if what == "slope":  # a layer that only another value would call could be chosen later
            self.slope = nn.PReLU(8)
        elif what == "group norm":
            self.group = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: torch.Tensor) -> object:
        y = self.bn(self.conv(x)).relu()
        if self.what == "returned":
            return self.last(y), y
        if self.what == "cat":
            return torch.cat([y, x], 1)
        if self.what == "half":
            return y[:, :4] + y[:, 4:]
        if self.what == "chunk":
            one, other = y.chunk(2, 1)
            return one + other
        if self.what == "slope":
            return self.last(self.slope(y))
        if self.what == "constant":
            return self.last(y * self.scale)
        if self.what == "group norm":
            return self.last(self.group(y))
        if self.what == "softmax":
            return self.last(y.softmax(1))
        if self.what == "shuffle":
            return nn.functional.pixel_shuffle(y, 2)
        if self.what == "flip":
            return self.last(y.flip(1))
        if self.what == "roll":
            return self.last(y.roll(1, 1))
        if self.what == "broadcast":
            return self.last(y + x.mean(1, keepdim=True))
        if self.what == "twice":
            return self.last(y) + self.last(y * 2)
        return self.last(y)


@pytest.mark.parametrize(
    "what",
    ["returned", "cat", "half", "chunk", "slope", "constant", "group norm", "softmax", "shuffle",
     "flip", "roll", "broadcast", "grouped", "twice"],
)  # fmt: skip
def test_what_is_not_understood_keeps_its_order(what: str) -> None:
    model = Reads(what).eval()
    captured = capture(model)
    around = AnalysisContext(captured, {})
    found = order_of(around, norms(captured)[0], ())
    assert isinstance(found, Declined)
    assert found.reason


def test_the_same_without_any_of_it_is_an_order() -> None:
    assert_exact(Reads("nothing"), torch.randn(2, 3, 4, 4))


def test_hooked_tied_and_parametrized_layers_keep_their_order() -> None:
    hooked, tied, parametrized = Reads("nothing"), Reads("nothing"), Reads("nothing")
    hooked.bn.register_forward_hook(lambda module, args, output: output)
    tied.last.weight = nn.Parameter(tied.conv.weight.detach().new_zeros(4, 8, 1, 1))
    tied.other = nn.Conv2d(8, 4, 1)
    tied.other.weight = tied.last.weight
    nn.utils.parametrizations.weight_norm(parametrized.conv)
    for model in (hooked, tied, parametrized):
        _, found = orders(model.eval())
        assert all(isinstance(order, Declined) for order in found)
