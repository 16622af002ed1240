"""rewrite.affine.laws: what an operation hands on, and twins that hand on nothing. Float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from passes import FoldNorm
from rewrite.protocol import Applied, apply_pass

RIGHT = 1e-11


class Between(nn.Module):
    """conv -> operation -> norm, at the end of the model: the norm can only go backward."""

    def __init__(self, operation: Callable[[Tensor], Tensor], features: int, rank: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank](features)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.operation(self.conv(x)))


def fold(model: nn.Module, shapes: bool = True) -> Applied:
    torch.manual_seed(0)
    model = models.randomize_norms_(model).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    applied = apply_pass(FoldNorm(), copy.deepcopy(model), (x,) if shapes else None)
    with torch.no_grad():
        for y in (x, 100 * torch.randn(3, 3, 4, 4, dtype=torch.float64)):
            want, got = model(y), applied.model(y)
            assert (got - want).abs().max() <= RIGHT * want.abs().max()
    return applied


HANDED_ON = [
    pytest.param(operation, id=name)
    for name, operation in {
        "cast to floating point": lambda y: y.to(torch.float64),
        "cast to the dtype of a value": lambda y: y.to(y.dtype),
        "an average": lambda y: F.avg_pool2d(y, 2),
        "a maximum": lambda y: F.max_pool2d(y, 3, 1, 1),
        "dropout in eval mode": lambda y: F.alpha_dropout(y, 0.5, False),
        "the largest value": lambda y: y.amax((2, 3), keepdim=True),
        "channels in another order": lambda y: y.roll(1, 1),
        "channels backward": lambda y: torch.flip(y, (1,)),
        "channels interleaved": lambda y: F.channel_shuffle(y, 2),
        "positions backward": lambda y: y.flip(-1),
        "an axis that moves and comes back": lambda y: y.movedim(1, -1).swapdims(1, 3),
        "some of the positions": lambda y: y.narrow(-1, 1, 2),
        "reflected borders": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
        "cut borders": lambda y: F.pad(y, (-1, 0)),
    }.items()
]


@pytest.mark.parametrize("operation", HANDED_ON)
def test_what_hands_a_map_on(operation: Callable[[Tensor], Tensor]) -> None:
    model = Between(operation, 4, 4)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    applied = fold(model)
    assert len(applied.changes) == 1, applied.skips
    assert "conv" in applied.changes[0].after


NOT = {
    "casts to a dtype that is not of floating point": lambda y: y.to(torch.int32).to(y.dtype),
    "rounds its values": lambda y: y.round(),
    "a shift would change its sign": lambda y: 0 - y,
    "adds a constant": lambda y: 1 - y,
    "max_unpool2d": lambda y: F.max_unpool2d(F.avg_pool2d(y, 2), places(y), 2),
    "pads with zeros": lambda y: F.pad(y, (1, 1)),
    "averages over zeros": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "drops values": lambda y: F.dropout(y, 0.5, True) * 0 + y,
    "reads the bits": lambda y: y.view(torch.int64).view(torch.float64) + y,
    "returns the places": lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
}


def places(y: Tensor) -> Tensor:
    return F.max_pool2d(torch.zeros_like(y), 2, return_indices=True)[1]


@pytest.mark.parametrize("words", NOT)
def test_what_hands_no_map_on_says_so(words: str) -> None:
    applied = fold(Between(NOT[words], 4, 4))
    assert not applied.changes
    if words not in ("drops values", "reads the bits", "returns the places"):
        assert words in applied.skips[0].reason


@pytest.mark.parametrize("pool", [F.max_pool1d, F.avg_pool1d])
def test_a_window_over_the_channels_hands_no_map_on(pool: Callable[..., Tensor]) -> None:
    """(N, C) is read as (C, L): the pool takes neighbouring channels together."""

    def operation(y: Tensor) -> Tensor:
        return pool(y.mean((2, 3)), 3, 1, 1)

    applied = fold(Between(operation, 4, 2))
    assert not applied.changes
    assert "neighbouring channels" in applied.skips[0].reason


def test_a_cast_to_an_unknown_dtype_is_declined_without_example_inputs() -> None:
    class Cast(Between):
        def forward(self, x: Tensor, like: Tensor | None = None) -> Tensor:
            return self.norm(self.conv(x).type_as(torch.sign(x)))

    assert len(fold(Cast(nn.Identity(), 4, 4), shapes=True).changes) == 1
    applied = fold(Cast(nn.Identity(), 4, 4), shapes=False)
    assert not applied.changes
    assert "dtype that is unknown (pass example_inputs)" in applied.skips[0].reason


# --- a norm without its affine part ---------------------------------------------------------------


class TwoNorms(nn.Module):
    """A group norm, and a batch norm that reads it: each would give its map to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GroupNorm(1, 3)
        self.second = nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


class Scaled(nn.Module):
    """An RMS norm, linear steps, and a scale: two maps for one affine part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RMSNorm(4, eps=1e-3)
        self.gamma = nn.Parameter(torch.rand(4) + 0.5)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(-self.first(x) * self.gamma)


@pytest.mark.parametrize("model", [TwoNorms, Scaled])
def test_no_map_arrives_at_a_norm_whose_affine_part_has_moved(model: type[nn.Module]) -> None:
    applied = fold(model())
    moved = {change.target: change.after for change in applied.changes}
    assert "its affine part folded into" in moved["first"]
    assert all("into first" not in after for after in moved.values())


class Branches(nn.Module):
    """Two convolutions of one value, one with a constant per channel, or per column."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) * self.gamma


def test_branches_with_a_constant_along_another_axis_are_not_merged() -> None:
    merged = fold(Branches((4, 1, 1)))
    assert any("one convolution" in change.after for change in merged.changes)
    left = fold(Branches((4,)))
    assert not left.changes
