"""An edited forward: only where it is harmless, and the class, its methods and its file stay."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

import rewrite
from models.randomize import randomize_norms_

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Plain(nn.Module):
    """A functional norm behind a convolution: to fold it, this forward has to be edited."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.limit, self.names = 3.0, ["a"]

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.norm(self.conv(x))).clamp(max=self.limit)

    def norm(self, y: Tensor) -> Tensor:
        b = self.bn
        return F.batch_norm(y, b.running_mean, b.running_var, b.weight, b.bias, False)

    def more(self, y: Tensor) -> Tensor:
        return y.relu()

    def raise_limit(self) -> None:
        self.names.append("b")


class Depth(Plain):
    def more(self, y: Tensor) -> Tensor:
        return stochastic_depth(y, 0.5, "row", self.training)


def make(kind: type[nn.Module]) -> nn.Module:
    return randomize_norms_(kind()).double().eval()


def folded(model: nn.Module) -> rewrite.Result[nn.Module]:
    return rewrite.convert(model, ["fold"], example_inputs=(X,))


def helper(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2


class NoGrad(Plain):
    forward = torch.no_grad()(Plain.forward)


class Inference(Plain):
    forward = torch.inference_mode()(Plain.forward)


class Cast(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class InAHelper(Plain):
    def more(self, y: Tensor) -> Tensor:
        return helper(y)


class OwnContext(Plain):
    def more(self, y: Tensor) -> Tensor:
        with contextlib.nullcontext():
            return y


class Counts(Plain):
    calls = 0

    def more(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y


class Caches(Plain):
    def more(self, y: Tensor) -> Tensor:
        self.last = y
        return y


class ByMode(Plain):
    def more(self, y: Tensor) -> Tensor:
        return y + 1 if self.training else y


class MakesTensors(Plain):
    def more(self, y: Tensor) -> Tensor:
        return torch.maximum(y, torch.tensor(0.0))


class Fourier(Plain):
    def more(self, y: Tensor) -> Tensor:
        return torch.fft.rfft2(y).abs()


class Algebra(Plain):
    def more(self, y: Tensor) -> Tensor:
        return torch.linalg.norm(y, dim=1, keepdim=True) + y


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (NoGrad, "enters no_grad"), (Inference, "enters inference_mode"), (Cast, "autocast"),
        (InAHelper, "enters no_grad"), (OwnContext, "nullcontext"), (Counts, "self.calls"),
        (Caches, "self.last"), (ByMode, "training"), (Depth, "training"),
        (MakesTensors, "makes a tensor"), (Fourier, "torch._C._fft"), (Algebra, "torch._C._linalg"),
    ],
)  # fmt: skip
def test_a_forward_that_would_lose_something_is_left_alone(kind: type[Plain], why: str):
    model = make(kind)
    expected = model(X)
    result = folded(model)
    assert not result.report.changes
    assert any(why in skip.reason for skip in result.report.skips), result.report.skips
    found = result.model(X)
    assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var)


class ChainWithMore(Chain):
    def get_l2(self) -> Tensor:
        return self.conv.weight.pow(2).sum()


def test_a_chain_becomes_a_sequential_only_if_it_is_no_more_than_that():
    assert isinstance(folded(make(Chain)).model, nn.Sequential)
    result = folded(make(ChainWithMore))
    assert isinstance(result.model, ChainWithMore) and result.model.get_l2() > 0
    assert any("get_l2() reads conv" in note for note in result.report.notes)


class Appends(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(x) * len(self.calls)


class Iterates(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.factors = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.factors)


class Draws(Plain):
    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, generator=generator, dtype=x.dtype)
        return super().forward(x) + noise


class HoldsAList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.others = [nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](super().forward(x))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Appends, "changes what it holds at each call"),
        (Iterates, "computes something else at each call"),
        (Draws, "makes an object of its own at each call"),
        (HoldsAList, "reads others[0], which is no attribute of its own"),
    ],
)
def test_a_forward_with_a_state_of_its_own_is_left_alone(kind: type[Plain], why: str):
    result = rewrite.convert(make(kind), ["fold"], example_inputs=X, verify=False)
    assert not result.report.changes and why in result.report.skips[0].reason


class WritesUnderAnotherName(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        z = y
        y += 1
        y *= 3
        return z - y.mean()


class WritesThroughAView(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        z = y.view(y.shape)
        y -= 3
        return z * 2


@pytest.mark.parametrize("kind", [WritesUnderAnotherName, WritesThroughAView])
def test_an_augmented_assignment_still_writes_what_has_another_name(kind: type[Plain]):
    model = make(kind)
    result = rewrite.convert(model, ["fold"], example_inputs=X)
    assert result.report.changes
    assert torch.allclose(result.model(X), model(X), rtol=0, atol=1e-12)
