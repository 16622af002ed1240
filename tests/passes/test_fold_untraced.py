"""passes.fold beside code that was not traced: opaque modules, their callers, what they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from passes import FoldNorm
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model

RIGHT = 1e-10


def prepare(model: nn.Module) -> nn.Module:
    return models.randomize_norms_(model).double().eval()


def image() -> Tensor:
    return torch.randn(2, 4, 7, 7, dtype=torch.float64)


def fold(model: nn.Module) -> tuple[nn.Module, Applied]:
    """Fold a copy; it must be the same function on inputs that take either branch."""
    x = image()
    applied = apply_pass(FoldNorm(), copy_model(model), (x,))
    with torch.no_grad():
        for given in (x, x.abs(), -x.abs(), 1e8 + x):
            got, want = applied.model(given), model(given)
            assert (got - want).abs().max() / want.abs().max() < RIGHT
    return applied.model, applied


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


class Unit(nn.Module):
    """conv, norm, and what a subclass does around them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)


class Opaque(nn.Module):
    """Control flow on values: nothing of this forward is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class CallsOpaque(Unit):
    """The convolution and its norm stand in the forward that calls an opaque module."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.opaque, self.reads = Opaque(), reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.reads == "the convolution":
            return self.bn(y) + self.opaque(y)
        return self.opaque(self.bn(y))


@pytest.mark.parametrize(("reads", "left"), [("the convolution", 1), ("the norm", 0)])
def test_a_convolution_in_the_caller_of_an_opaque_module(reads: str, left: int) -> None:
    assert norms(fold(prepare(CallsOpaque(reads)))[0]) == left


class OpaqueCaller(Unit):
    """The forward that calls the convolution is itself opaque: who reads its output is unknown."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.mean() > 1e6 else torch.relu(self.bn(y))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_convolution_whose_caller_is_opaque(depth: int) -> None:
    model = prepare(nn.Sequential(OpaqueCaller(), nn.ReLU()) if depth else OpaqueCaller())
    folded, applied = fold(model)
    assert norms(folded) == 1
    assert "is not called in any traced forward" in applied.skips[0].reason


class Borrows(nn.Module):
    """An opaque module that calls a convolution which stands elsewhere."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.borrowed = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.borrowed(x) if x.sum() > 0 else self.borrowed(-x)


class Lends(Unit):
    """The caller of an opaque module lends it its own convolution."""

    def __init__(self, lends: bool) -> None:
        super().__init__()
        self.opaque = Borrows(self.conv if lends else nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))) + self.opaque(x)


@pytest.mark.parametrize("lends", [True, False])
def test_a_convolution_that_an_opaque_module_calls_too(lends: bool) -> None:
    folded, applied = fold(prepare(Lends(lends)))
    assert norms(folded) == int(lends)
    assert not lends or "opaque is opaque and may call opaque.borrowed" in applied.skips[0].reason


class Sequence(nn.Module):
    """conv, norm in a Sequential, inside a forward that cannot be traced."""

    def __init__(self, item: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.item = item

    def forward(self, x: Tensor) -> Tensor:
        if self.item and x.sum() > 1e6:
            return self.block[0](x)
        return self.block(x) if x.sum() > 0 else self.block(-x)


@pytest.mark.parametrize("item", [True, False])
def test_an_opaque_forward_that_may_call_an_item(item: bool) -> None:
    """Whether it does is not told from its code: both stay, and both stay right."""
    folded, _ = fold(prepare(Sequence(item)))
    assert norms(folded) == 1


# --- what a forward keeps ------------------------------------------------------------------------


class Keeps(Unit):
    """The forward keeps a value on its module, where anybody may read it afterwards."""

    def __init__(self, how: str, what: str) -> None:
        super().__init__()
        self.how, self.what = how, what
        self.last: Any = None
        self.seen: list[Tensor] = []
        self.named: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        kept = y if self.what == "conv" else z
        if self.how == "attribute":
            self.last = kept
        elif self.how == "list":
            self.seen.append(kept)
        else:
            self.named["here"] = [kept]
        return torch.relu(z)

    def kept(self) -> Tensor:
        return {"attribute": self.last, "list": self.seen[-1:], "dict": self.named.get("here")}[
            self.how
        ][0]


@pytest.mark.parametrize(("what", "left"), [("conv", 1), ("bn", 0)])
@pytest.mark.parametrize("how", ["attribute", "list", "dict"])
@pytest.mark.parametrize("deep", [True, False])
def test_what_is_kept_stays_what_it_is(how: str, what: str, left: int, deep: bool) -> None:
    model = prepare(nn.Sequential(Keeps(how, what), nn.ReLU()) if deep else Keeps(how, what))
    folded, applied = fold(model)
    assert norms(folded) == left
    assert not left or "the value is kept as" in applied.skips[0].reason
    x = image()
    with torch.no_grad():
        model(x), folded(x)
    one, other = (m[0] if deep else m for m in (model, folded))
    assert (one.kept() - other.kept()).abs().max() < RIGHT


# --- tensors that other code reads ---------------------------------------------------------------


class ReadsTensors(Unit):
    """A functional call, or arithmetic, on tensors of a layer that is also called."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.conv, self.bn
        if self.what == "the functional call is normalized":
            y = F.conv2d(x, conv.weight, conv.bias, padding=1)
            return torch.relu(bn(y)) + torch.tanh(conv(x))
        if self.what == "the module is normalized":
            y = F.conv2d(x, conv.weight, padding=1)
            return torch.relu(bn(conv(x))) + torch.tanh(y)
        if self.what == "forward is called by name":
            return torch.relu(bn(conv.forward(x))) + torch.tanh(conv(x))
        z = torch.relu(bn(conv(x)))
        if self.what == "gamma is read":
            return z * bn.weight.sum()
        return z


class ReadsStatistics(Unit):
    """The same with what only this kind of norm has: the code says so, whichever way is taken."""

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.conv, self.bn
        return torch.relu(bn(conv(x))) + bn.running_mean.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    "what",
    [
        "the functional call is normalized", "the module is normalized",
        "forward is called by name", "gamma is read",
    ],
)  # fmt: skip
def test_declines_where_the_tensors_are_read_elsewhere(what: str) -> None:
    folded, applied = fold(prepare(ReadsTensors(what)))
    assert norms(folded) == 1
    assert "is also read by" in applied.skips[0].reason
    assert norms(fold(prepare(ReadsTensors("nothing else")))[0]) == 0


def test_declines_where_statistics_are_read() -> None:
    folded, applied = fold(prepare(ReadsStatistics()))
    assert norms(folded) == 1
    assert "bn.running_mean at" in applied.skips[0].reason


class FunctionalConv(nn.Conv2d):
    """A convolution whose own forward calls the function: it is traced through."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class ReadsTheWeight(Borrows):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.borrowed.weight, padding=1) if x.sum() > 0 else -x


@pytest.mark.parametrize("reads", [Borrows, ReadsTheWeight, None])
def test_a_functional_layer_that_opaque_code_reads_too(reads: type[nn.Module] | None) -> None:
    class Model(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.conv = FunctionalConv(4, 4, 3, padding=1)
            self.opaque = reads(self.conv) if reads is not None else Opaque()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x))) + self.opaque(x)

    folded, applied = fold(prepare(Model()))
    assert norms(folded) == int(reads is not None)
    assert reads is None or "readers that were not traced" in applied.skips[0].reason


class CallsForward(Unit):
    """`conv.forward` by name; with `opaque`, the module is called by code that is not traced."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = Borrows(self.conv) if opaque else Opaque()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv.forward(x))) + self.opaque(x)


@pytest.mark.parametrize("opaque", [True, False])
def test_a_forward_that_is_called_by_name(opaque: bool) -> None:
    folded, applied = fold(prepare(CallsForward(opaque)))
    assert norms(folded) == int(opaque)
    assert not opaque or "may call opaque.borrowed" in applied.skips[0].reason
