"""A branch on a size that only rebinds a tensor's name is about that name, and nothing after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewrite
from models.randomize import randomize_norms_

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.more = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])


class AddsTheBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            x = x[None]
        return self.bn(self.conv(x))


class Casts(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            x = torch.clamp(x, -1, 1).float()
        return self.bn(self.conv(x))


class PadsOnTheOtherDevice(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.device.type == "mps":
            x = F.pad(x, (1, 1))
        return self.bn(self.conv(x))


class PadsByHeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        if (short := 8 - x.shape[-1]) > 0:
            x = F.pad(x, (0, short))
        elif x.shape[-2] > 100:
            x = x[:, :, :100]
        return self.bn(self.conv(x))


class PoolsToASizeOfItsOwn(Base):
    """The name of the size is read in the branch alone; a number of the module decides."""

    def __init__(self) -> None:
        super().__init__()
        self.least = 9

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.least - 2:
            size = (max(self.least, x.shape[-2]), max(self.least, x.shape[-1]))
            x = F.adaptive_avg_pool2d(x, size)
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    "kind", [AddsTheBatch, Casts, PadsOnTheOtherDevice, PadsByHeight, PoolsToASizeOfItsOwn]
)
def test_a_fold_after_the_names_that_a_branch_rebinds(kind: type[Base]) -> None:
    model = randomize_norms_(kind().double().eval())
    result = rewrite.convert(model, "fold", example_inputs=X)
    assert [change.target for change in result.report.changes] == ["bn"]
    for x in (X * 100, X[0], X[..., :6]):
        if kind is AddsTheBatch or x.dim() == 4:
            assert torch.allclose(result.model(x), model(x), rtol=1e-11, atol=1e-11)


class Between(Base):
    """The branch reads what the layer made: another reader, for another size."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.shape[-1] < 6:
            y = F.relu(y)
        return self.bn(y)


class Counts(Base):
    """The name is a number: it chooses what a later line calls."""

    def forward(self, x: Tensor) -> Tensor:
        which = 1
        if x.shape[-1] < 8:
            which = 0
        y = self.conv(x)
        return self.more[which](y)


class CountsElsewhere(Base):
    """A lambda reads the number: it is no name of the branch alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 8:
            which = 0
        elif x.shape[-1] >= 8:
            which = 1
        pick = lambda: self.more[which]  # noqa: E731
        return pick()(self.conv(x))


class WritesIntoIt(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y
        if x.shape[-1] < 8:
            z = y.mul_(2)
        return self.bn(y) + z.mean()


class CallsTheNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 8:
            x = self.bn(x.repeat(1, 2, 1, 1)[:, :4])[:, :3]
        return self.bn(self.conv(x))


class CallsByAName(Base):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        if x.shape[-1] < 8:
            x = bn(x.repeat(1, 2, 1, 1)[:, :4])[:, :3]
        return bn(self.conv(x))


class Leaves(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.shape[-1] < 8:
            return y
        return self.bn(y)


@pytest.mark.parametrize(
    "kind", [Between, Counts, CountsElsewhere, WritesIntoIt, CallsTheNorm, CallsByAName, Leaves]
)
def test_a_branch_that_may_do_more_stops_the_fold(kind: type[Base]) -> None:
    model = randomize_norms_(kind().double().eval())
    result = rewrite.convert(model, "fold", example_inputs=X)
    assert not result.report.changes
    assert any("test_rebinding.py:" in skip.reason for skip in result.report.skips)
    for x in (X, X[..., :6]):
        assert torch.allclose(result.model(x), model(x), rtol=1e-11, atol=1e-11)
