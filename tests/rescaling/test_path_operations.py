"""Operations without weights: what each does to a sum over paths."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from rewrite.errors import CaptureError
from rewrite.rescaling.path_norm import path_norms
from tests.rescaling.paths import ORDERS, RIGHT
from tests.rescaling.test_path_norm import Functional


def test_takes_what_is_homogeneous_in_another_spelling() -> None:
    model = Functional(lambda x: torch.abs(x).neg().contiguous() / 2 - x)
    assert rewrite.path_norm(model, 1, torch.zeros(1, 4)) > 0


class Sized(nn.Module):
    """Sizes that the forward computes: padding before a maximum, and an image of the input's."""

    def __init__(self, computed: bool, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.computed, self.before, self.after = computed, before, after

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:] if self.computed else (5, 5)
        more = x.shape[-1] % 2 if self.computed else 1
        y = torch.relu(self.before(x))
        y = F.pad(y, (more, 0, 0, more), value=-math.inf)
        y = F.max_pool2d(y, 2)
        y = F.pad(y, [0, more, more, 0])
        y = F.interpolate(self.after(y), size=size, mode="bilinear", align_corners=False)
        return F.interpolate(y, size, mode="nearest")


def test_a_computed_size_is_the_number_that_it_is() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)
    x = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    computed, fixed = (Sized(c, *layers).double().eval() for c in (True, False))
    assert computed(x).shape == (1, 2, 5, 5)
    found, expected = path_norms(computed, ORDERS, x), path_norms(fixed, ORDERS, x)
    assert found == expected and all(map(math.isfinite, found.values()))


class LowestPad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), value=-math.inf)


def test_padding_with_the_lowest_value_before_a_maximum_is_no_path() -> None:
    torch.manual_seed(0)
    conv, pool = nn.Conv2d(2, 3, 1).double(), nn.MaxPool2d(2, padding=1)
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    one = path_norms(nn.Sequential(conv, nn.ReLU(), pool), ORDERS, x)
    two = path_norms(nn.Sequential(conv, nn.ReLU(), LowestPad(), nn.MaxPool2d(2)), ORDERS, x)
    assert one == pytest.approx(two, rel=RIGHT)


def test_a_size_that_the_input_decides_is_refused_with_the_line() -> None:
    class Decided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.conv(x), (1, 0), value=x.amax())

    with pytest.raises(CaptureError, match=r"test_path_operations\.py:"):
        rewrite.path_norm(Decided(), 2, torch.zeros(1, 2, 4, 4))


class Halves(nn.Module):
    """A view of what relu makes of a part of a value."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv, self.last = nn.Conv2d(2, 3, 1), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        half = torch.relu(self.conv(x).chunk(2, 2)[0])
        return self.last(getattr(half, self.name)(-1, 24))


def test_a_view_of_a_part_is_that_of_a_copy_of_it() -> None:
    torch.manual_seed(0)
    viewed, copied = Halves("view").double(), Halves("reshape").double()
    copied.load_state_dict(viewed.state_dict())
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    assert viewed(x).shape == (1, 2)
    assert rewrite.path_norm(viewed, 2, x) == rewrite.path_norm(copied, 2, x) > 0
