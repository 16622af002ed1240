"""What is written orders its readers, is no constant, and is never dead code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewrite
from models.randomize import randomize_norms_
from rewrite.graph.capture import capture


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.register_buffer("center", torch.rand(4, 1, 1))
        self.spare = nn.Parameter(torch.rand(4, 1, 1))

    def norm(self, y: Tensor) -> Tensor:
        b = self.bn
        return F.batch_norm(y, b.running_mean, b.running_var, b.weight, b.bias, False)


def model_of(forward: Callable[..., Tensor]) -> nn.Module:
    kind = type(forward.__name__, (Base,), {"forward": forward})
    model = randomize_norms_(kind())
    nn.init.normal_(model.bn.bias)
    return model.double().eval()


X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


@torch.no_grad()
def assert_same(model: nn.Module, result: nn.Module) -> None:
    for x in (X, 100 * X, X[:1]):
        assert torch.allclose(result(x.clone()), model(x.clone()), rtol=0, atol=1e-9)


# -- statements -------------------------------------------------------------------------------


def clamps(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    torch.clamp_(y, -1, 1)
    return self.a(y)


def replaces_nan(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    torch.nan_to_num_(y, 0.0).clamp_(-1, 1)
    return self.a(y)


def masks_a_view(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    y[:, :2].mul_(0)
    return self.a(y)


def assigns_an_index(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    y[:, 0] = 3.0
    return self.a(y)


def writes_out(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    torch.clamp(y, -1, 1, out=y)
    return self.a(y)


def copies(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    y.copy_(y.clamp(-1, 1))
    return self.a(y)


def relu_by_flag(self: Base, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    F.relu(y, True)
    return self.a(y)


# -- order ------------------------------------------------------------------------------------


def written_after_the_norm(self: Base, x: Tensor) -> Tensor:
    y = self.conv(x)
    n = self.bn(y)
    z = F.relu_(y)
    return self.a(n) + self.b(z)


def written_through_a_view(self: Base, x: Tensor) -> Tensor:
    y = self.conv(x)
    n = self.bn(y)
    y.view(-1).clamp_(-0.1, 0.1)
    return self.a(n) + self.b(y)


def output_written(self: Base, x: Tensor) -> Tensor:
    y = self.conv(x)
    n = self.bn(y)
    n.relu_()
    return self.a(n) + self.b(y)


STATEMENTS = (
    clamps, replaces_nan, masks_a_view, assigns_an_index, writes_out, copies, relu_by_flag,
    written_after_the_norm, written_through_a_view, output_written,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The out")
@pytest.mark.parametrize("forward", STATEMENTS)
def test_no_write_is_lost_or_moved(forward: Callable[..., Tensor]):
    model = model_of(forward)
    result = rewrite.convert(model, ["fold"], example_inputs=(X,))
    assert result.report.ok
    assert_same(model, result.model)


@pytest.mark.parametrize("forward", [written_after_the_norm, written_through_a_view])
def test_a_write_between_two_readers_is_the_reason(forward: Callable[..., Tensor]):
    skips = rewrite.convert(model_of(forward), ["fold"], example_inputs=(X,)).report.skips
    assert any("writes into" in skip.reason for skip in skips)


def merged(self: Base, x: Tensor) -> Tensor:
    x = self.conv(x)
    a = self.a(x)
    F.relu_(x)
    return a + self.b(x)


def merged_without(self: Base, x: Tensor) -> Tensor:
    x = F.relu_(self.conv(x))
    return self.a(x) + self.b(x)


@pytest.mark.parametrize(("forward", "changes"), [(merged, 0), (merged_without, 1)])
def test_branches_merge_only_where_they_read_the_same(forward: Callable[..., Tensor], changes: int):
    model = model_of(forward)
    result = rewrite.convert(model, ["merge-branches"], example_inputs=(X,))
    assert len(result.report.changes) == changes
    assert_same(model, result.model)


# -- constants --------------------------------------------------------------------------------


def updates_a_buffer(self: Base, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    out = self.a(torch.relu(y) - self.center)
    self.center.lerp_(y.detach().mean((0, 2, 3))[:, None, None], 0.1)
    return out


def updates_through_a_view(self: Base, x: Tensor) -> Tensor:
    y = self.a(self.bn(self.conv(x)) * self.center)
    with torch.no_grad():
        self.center.view(-1)[:2] *= 0.5
    return y


def assigns_a_buffer(self: Base, x: Tensor) -> Tensor:
    y = self.a(self.bn(self.conv(x)) * self.center)
    self.center = self.center * 0.5
    return y


def writes_a_parameter(self: Base, x: Tensor) -> Tensor:
    y = self.a(self.bn(self.conv(x)) + self.spare)
    self.spare.data.mul_(0.5)
    return y


def makes_noise(self: Base, x: Tensor) -> Tensor:
    return self.a(self.bn(self.conv(x)) * torch.rand(4, 1, 1).double())


@pytest.mark.parametrize(
    "forward", [updates_a_buffer, updates_through_a_view, assigns_a_buffer, writes_a_parameter]
)
def test_what_a_forward_writes_is_no_constant(forward: Callable[..., Tensor]):
    model = model_of(forward)
    result = rewrite.convert(model, ["fold"], example_inputs=(X,), verify=False)
    assert not any("constant" in change.before for change in result.report.changes)
    for _ in range(3):  # each call changes the tensor
        assert torch.allclose(result.model(X), model(X), rtol=0, atol=1e-9)


def test_what_is_drawn_at_each_call_is_no_constant():
    captured = capture(model_of(makes_noise))
    drawn = [n for n in captured.nodes() if str(n.target).startswith("_constant")]
    assert drawn and not any(captured.is_fixed(node) for node in drawn)


def scales(self: Base, x: Tensor) -> Tensor:
    return self.a(self.bn(self.conv(x)) * self.center)


def test_a_buffer_that_nothing_writes_is_a_constant():
    model = model_of(scales)
    result = rewrite.convert(model, ["fold"], example_inputs=(X,))
    assert any("constant" in change.before for change in result.report.changes)
    assert_same(model, result.model)
