"""rewrite.tracing.untraced_branches: what a forward does for other values of its arguments.

Each model is folded and run with the value that was not traced: a fold that does not know of it is
another function there. The twins have the same code without the choice, and fold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from passes import FoldNorm
from rewrite.graph.capture import capture
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model
from rewrite.tracing.code.branch_effects import BranchEffects

RIGHT, WRONG = 1e-10, 1e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class ChoosingBlock(Block):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return y if raw else self.bn(y)


class Holds(nn.Module):
    """What all of these are made of."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.block = block()


# --- another caller ------------------------------------------------------------------------------


class CallsAnItem(Holds):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        if raw:
            return self.block[0](x)
        return self.block(x)


class CallsAPart(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.relu(self.block.conv(x) if raw else self.block(x))


class CallsInAMethod(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.relu(self.features(x, raw))

    def features(self, x: Tensor, only: bool) -> Tensor:
        return self.block.conv(x) if only else self.block(x)


class CallsByName(Holds):
    def forward(self, x: Tensor, raw: str = "norm") -> Tensor:
        return torch.relu({"norm": self.block, "raw": self.block.conv}[raw](x))


class CallsByAttribute(Holds):
    def forward(self, x: Tensor, raw: str = "block") -> Tensor:
        return torch.relu(getattr(self, raw)(x))

    @property
    def raw(self) -> nn.Module:
        return self.block.conv


class CallsInALoop(Holds):
    def forward(self, x: Tensor, raw: int = 0) -> Tensor:
        y = self.block(x)
        for _ in range(raw):
            y = self.block.conv(y)
        return torch.relu(y)


class CallsInAnOperator(Holds):
    def forward(self, x: Tensor, raw: int | None = None) -> Tensor:
        y = self.block(x)
        z = raw and self.block.conv(y)
        return torch.relu(y) if z is None else z


class CallsAnAlias(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        part, again = self.block.conv, 2 if raw else 1
        y = self.block(x)
        if again > 1:
            y = part(y)
        return torch.relu(y)


def _helper(module: Any, x: Tensor, raw: bool) -> Tensor:
    return module.block.conv(x) if raw else module.block(x)


class CallsInAFunction(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.relu(_helper(self, x, raw))


class CallsInItsBase(CallsAPart):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return super().forward(x, raw=raw)


# --- another reader ------------------------------------------------------------------------------


class GivesItOn(Holds):
    def __init__(self) -> None:
        super().__init__(ChoosingBlock)

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.relu(self.block(x, raw))


class GivesItOnByName(GivesItOn):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        options = {"raw": raw}
        return torch.relu(self.block(x, **options))


class GivesItOnInALoop(GivesItOn):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ChoosingBlock(), ChoosingBlock()])
        del self.block

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x, raw=raw))
        return x


class ReturnsWhatABlockMade(nn.Module):
    """The value is made in one block and normalized in another: the forward between returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Sequential(nn.Conv2d(3, 3, 3)), nn.Sequential(nn.BatchNorm2d(3))

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        if raw:
            return y
        return torch.relu(self.bn(y))


class ReturnsItFurtherDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ReturnsWhatABlockMade()

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.tanh(self.inner(x, raw))


class TakesOtherChannels(nn.Module):
    """Which channels are normalized depends on the argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, raw: int = 0) -> Tensor:
        return torch.relu(self.bn(self.conv(x)[:, raw : raw + 3]))


class Scales(nn.Module):
    """A factor between the layers; t would have to be divided by the one that was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, raw: float = 2.0) -> Tensor:
        return torch.relu(self.bn(self.conv(x) * raw))


class Reads(nn.Module):
    """May return what it is given instead of its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, y: Tensor, raw: bool = False) -> Tensor:
        return y if raw else self.bn(y)


class ReadsAnAlias(Reads):
    def forward(self, y: Tensor, raw: bool = False) -> Tensor:
        z = y
        y = self.bn(y)
        return z if raw else y


class ReadsInAMethod(Reads):
    def forward(self, y: Tensor, raw: bool = False) -> Tensor:
        return self.pick(y, raw)

    def pick(self, value: Tensor, flag: bool) -> Tensor:
        return value if flag else self.bn(value)


class ReadsInAnOperator(Reads):
    def forward(self, y: Tensor, raw: float = 0.0) -> Tensor:
        return torch.add(self.bn(y), y, alpha=raw) if raw else self.bn(y)


class IsRead(nn.Module):
    """The value enters a module that may read it in another way."""

    inner: type[nn.Module] = Reads

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 3, 3), self.inner()

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.tanh(self.block(self.conv(x), raw))


class IsReadByAnAlias(IsRead):
    inner = ReadsAnAlias


class IsReadInAMethod(IsRead):
    inner = ReadsInAMethod


class IsReadInAnOperator(IsRead):
    inner = ReadsInAnOperator


CHOICES: dict[type[nn.Module], Any] = {
    CallsAnItem: True, CallsAPart: True, CallsInAMethod: True, CallsByName: "raw",
    CallsByAttribute: "raw", CallsInALoop: 2, CallsInAnOperator: 1, CallsAnAlias: True,
    CallsInAFunction: True, CallsInItsBase: True, GivesItOn: True, GivesItOnByName: True,
    GivesItOnInALoop: True, ReturnsWhatABlockMade: True, ReturnsItFurtherDown: True,
    TakesOtherChannels: 2, Scales: 3.0, IsRead: True, IsReadByAnAlias: True,
    IsReadInAMethod: True, IsReadInAnOperator: 2.0,
}  # fmt: skip


def prepare(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return models.randomize_norms_(kind()).double().eval()


def error(got: nn.Module, want: nn.Module, *inputs: Any, **named: Any) -> float:
    with torch.no_grad():
        a, b = got(*inputs, **named), want(*inputs, **named)
    return float((a - b).abs().max() / b.abs().max())


def fold(model: nn.Module, shapes: bool) -> Applied:
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    applied = apply_pass(FoldNorm(), copy_model(model), (x,) if shapes else None)
    assert error(applied.model, model, x) < RIGHT
    return applied


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize("kind", CHOICES, ids=lambda kind: kind.__name__)
def test_a_fold_holds_for_the_value_that_was_not_traced(
    kind: type[nn.Module], shapes: bool
) -> None:
    model = prepare(kind)
    applied = fold(model, shapes)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    assert error(applied.model, model, x, raw=CHOICES[kind]) < RIGHT
    assert not applied.changes
    assert all("its argument" in skip.reason for skip in applied.skips)


# --- twins: nothing depends on the argument, or what does is not next to the norm ----------------


class DoesNotUseIt(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.relu(self.block(x))


class ChoosesBehind(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        x = torch.relu(self.block(x))
        return x.mean((2, 3)) if raw else x


class CallsTheWhole(Holds):
    def forward(self, x: Tensor, raw: int = 1) -> Tensor:
        x = torch.tanh(self.block(x))
        return torch.relu(self.block(x)) if raw == 2 else x


class OnlyRaises(Holds):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        if raw:
            raise ValueError("there is no raw output")
        return torch.relu(self.block(x))


class FillsItIn(Holds):
    def forward(self, x: Tensor, raw: bool | None = None) -> Tensor:
        raw = raw if raw is not None else self.training
        return torch.relu(self.block(x))


class GivesAConstant(GivesItOn):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return torch.relu(self.block(x, False))


class Masks(Reads):
    """An attention's mask: added to what was computed from the value, not to the value."""

    def forward(self, y: Tensor, raw: float | None = None) -> Tensor:
        scores = torch.tanh(self.bn(y))
        return self.add(torch.clamp(scores, max=raw), raw)

    def add(self, scores: Tensor, mask: float | None) -> Tensor:
        return scores if mask is None else scores + mask


class IsMasked(IsRead):
    inner = Masks

    def forward(self, x: Tensor, raw: float | None = 1.0) -> Tensor:
        return self.block(self.conv(x), raw)


TWINS = (
    IsMasked,
    DoesNotUseIt,
    ChoosesBehind,
    CallsTheWhole,
    OnlyRaises,
    FillsItIn,
    GivesAConstant,
)


@pytest.mark.parametrize("kind", TWINS, ids=lambda kind: kind.__name__)
def test_what_does_not_depend_on_the_argument_folds(kind: type[nn.Module]) -> None:
    model = prepare(kind)
    applied = fold(model, shapes=True)
    assert len(applied.changes) == 1, applied.skips
    if kind is not OnlyRaises:
        x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
        assert error(applied.model, model, x, raw=2) < RIGHT


# --- an input that may be None -------------------------------------------------------------------


class ReturnsWithoutIt(Holds):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.block.conv(x)
        if skip is None:
            return y
        return torch.relu(self.block.bn(y) + skip)


class CallsWithoutIt(Holds):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block.conv(x) if skip is None else torch.relu(self.block(x) + skip)


class BelowAnOpaque(Holds):
    def __init__(self) -> None:
        super().__init__(ReturnsWithoutIt)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.block(x, skip)


class AddsItBehind(Holds):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = torch.tanh(self.block(x))
        return y if skip is None else y + skip


class RaisesWithoutIt(Holds):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if skip is None:
            raise ValueError("skip is missing")
        return torch.relu(self.block(x) + skip)


@pytest.mark.parametrize(
    ("kind", "folds"),
    [
        (ReturnsWithoutIt, False), (CallsWithoutIt, False), (BelowAnOpaque, False),
        (AddsItBehind, True), (RaisesWithoutIt, True),
    ],
)  # fmt: skip
def test_a_fold_holds_where_an_input_is_none(kind: type[nn.Module], folds: bool) -> None:
    model = prepare(kind)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    applied = apply_pass(FoldNorm(), copy_model(model), (x, x))
    assert len(applied.changes) == int(folds), applied.skips
    assert folds or all("its argument skip" in skip.reason for skip in applied.skips)
    assert error(applied.model, model, x, x) < RIGHT
    if kind is not RaisesWithoutIt:
        assert error(applied.model, model, x, None) < RIGHT


def test_the_fold_without_this_knowledge_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: with nothing known of untaken code, each of these is another function."""
    from rewrite.tracing import untraced_branches as untaken

    monkeypatch.setattr(untaken.UntracedBranches, "caller", lambda self, place: None)
    monkeypatch.setattr(untaken.UntracedBranches, "reader", lambda self, region, node: None)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    for kind in (CallsAnItem, CallsInAMethod, CallsByName, GivesItOn, GivesItOnInALoop):
        model = prepare(kind)
        assert error(fold(model, True).model, model, x, raw=CHOICES[kind]) > WRONG, kind


def test_the_reason_names_the_forward_the_place_and_the_argument() -> None:
    assert capture(prepare(CallsAPart)).unknown_caller("block.conv") == (
        "the forward of the model may call block.conv for another value of its argument raw"
    )
    captured = capture(prepare(GivesItOn))
    assert captured.readers(captured.calls("block.conv")[0]).reason == (
        "the forward of block may read it otherwise for another value of its argument raw"
    )


def test_code_that_cannot_be_read_may_call_anything() -> None:
    source = "def forward(self, x, raw=False):\n    return self.block(x)\n"
    space: dict[str, Any] = {}
    exec(compile(source, "<nowhere>", "exec"), space)
    kind = type("Unreadable", (Holds,), {"forward": space["forward"]})
    assert "may call block" in str(capture(prepare(kind)).unknown_caller("block.conv"))


# -- sizes of a value are not the value -------------------------------------------------------


def masked(scores: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    return scores if mask is None else scores + mask[:length, :length]


def mixed(value: Tensor, mask: Tensor | None = None) -> Tensor:
    return value if mask is None else value * mask


class AsksForItsSize(nn.Module):
    """An attention in short: the mask meets scores, and of its input no more than the length."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        q = self.qk(x)
        return masked(q @ q.transpose(1, 2), length, mask) @ self.v(x)


class ReadsItsInput(AsksForItsSize):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.qk(x)
        return (q @ q.transpose(1, 2)) @ self.v(x) + mixed(x, mask) * 0


class Normed(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), attention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(self.norm(x), mask)


def test_the_length_of_a_value_beside_a_mask_stops_no_fold_and_the_value_does() -> None:
    for attention, folds in ((AsksForItsSize(), 1), (ReadsItsInput(), 0)):
        model = Normed(attention).double().eval()
        nn.init.uniform_(model.norm.weight, 0.5, 1.5)
        nn.init.normal_(model.norm.bias)
        x, mask = torch.randn(2, 5, 4).double(), torch.randn(5, 5).double()
        result = rewrite.convert(model, ["fold"], example_inputs=(x,))
        assert len(result.report.changes) == folds
        if folds:
            assert torch.allclose(result.model(x, mask), model(x, mask), rtol=0, atol=1e-12)


# --- code that has run by the time ---------------------------------------------------------------


def plus(value: Tensor, mask: Tensor | None = None) -> Tensor:
    return value if mask is None else value + mask


class Attends(nn.Module):
    """An attention in short: a mask chooses among scores; what comes last knows nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = plus(torch.tanh(self.first(x)), mask)
        return self.last(x)


class ReadsItLater(Attends):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.last(torch.tanh(self.first(x)))
        return plus(x, mask)


class ReadsItOnItsLine(Attends):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return plus(self.last(torch.tanh(self.first(x))), mask)


class ReadsItInTheNextRound(Attends):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.first(x))
        for _ in range(1 if mask is None else 2):
            x = y if mask is None else x + mask
            x = self.last(x)
        return x


class ReadsItInAFunction(Attends):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        later = lambda: x if mask is None else x + mask  # noqa: E731 - what is tried
        x = self.last(torch.tanh(self.first(x)))
        return later()


class Scaled(nn.Module):
    """A gain behind an attention: it goes into the attention's last layer."""

    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.inner, self.gain = inner(), nn.Parameter(torch.rand(3, 1, 1) + 0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.inner(x, mask) * self.gain


LATER = (ReadsItLater, ReadsItOnItsLine, ReadsItInTheNextRound, ReadsItInAFunction)


@pytest.mark.parametrize("inner", [Attends, *LATER], ids=lambda kind: kind.__name__)
def test_code_that_has_run_by_then_reads_nothing_of_it(inner: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Scaled(inner).double().eval()
    x, mask = torch.randn(2, 3, 5, 5).double(), torch.rand(2, 3, 5, 5).double()
    applied = apply_pass(FoldNorm(), copy_model(model), x)
    assert len(applied.changes) == (inner is Attends), applied.skips
    for given in (None, mask):
        torch.testing.assert_close(applied.model(x, given), model(x, given), rtol=0, atol=RIGHT)


def test_the_fold_would_show_without_the_order_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BranchEffects, "is_over", lambda self, code, line: True)
    torch.manual_seed(0)
    model = Scaled(ReadsItLater).double().eval()
    x, mask = torch.randn(2, 3, 5, 5).double(), torch.rand(2, 3, 5, 5).double()
    applied = apply_pass(FoldNorm(), copy_model(model), x)
    assert len(applied.changes) == 1
    assert (applied.model(x, mask) - model(x, mask)).abs().max() > WRONG
