"""passes.ClipChannels: a bound a channel, the same function, and scales that pass through it."""

from __future__ import annotations

import json

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite
from models import randomize_norms_
from passes import ClipChannels, FoldNorm, Rebalance
from rewrite.errors import CheckpointError
from rewrite.fold.replay import apply_report
from rewrite.nn import ChannelClip
from rewrite.outcomes import Contract

RIGHT = 1e-12


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        left, right = a(x), b(x)
    return float((left - right).abs().max() / left.abs().max())


def clipped(seed: int = 0, inplace: bool = True) -> nn.Sequential:
    """Layers around ReLU6s, some of whose values are above the bound."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Hardtanh(0.0, 2.0),
        nn.Conv2d(8, 4, 1),
    ]  # fmt: skip
    model = randomize_norms_(nn.Sequential(*layers)).double().eval()
    with torch.no_grad():
        model[1].weight.mul_(torch.logspace(-1, 1, 8, dtype=torch.float64))
    return model


X = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3


def test_the_function_stays_and_every_channel_is_scaled_with_its_bound() -> None:
    model = clipped()
    with torch.no_grad():
        assert (model[:2](X) > 6).any()  # else no bound would matter
    passes = [FoldNorm(), ClipChannels(), Rebalance("equalize")]
    result = rewrite.convert(model, passes, example_inputs=(X,))
    assert ClipChannels.contract is Contract.EXACT and result.report.ok
    assert error(model, result.model, X) < RIGHT
    assert error(model, result.model, X * 100) < RIGHT
    assert isinstance(result.model[2], ChannelClip) and result.model[5].bound.shape == (8, 1, 1)
    assert result.model[2].bound.unique().numel() == 8
    written = result.model[0].weight.flatten(1).abs().amax(1)
    read = result.model[3].weight.flatten(1).abs().amax(1)
    torch.testing.assert_close(written, read, rtol=1e-6, atol=0)
    again = rewrite.convert(result.model, [Rebalance("equalize")], example_inputs=(X,))
    assert not again.report.changes


def test_without_it_a_relu6_lets_no_scale_pass() -> None:
    result = rewrite.convert(clipped(), [FoldNorm(), Rebalance("equalize")], example_inputs=(X,))
    assert not any(change.after.startswith("scaled") for change in result.report.changes)


def test_a_bound_that_stays_is_wrong() -> None:
    passes = [FoldNorm(), ClipChannels(), Rebalance("equalize")]
    model = clipped()
    result = rewrite.convert(model, passes, example_inputs=(X,))
    result.model[2].bound.fill_(6.0)
    assert error(model, result.model, X) > 1e-3


def test_function_calls_are_replaced_and_channels_at_the_end() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.clamp(self.b(F.relu6(self.a(x))), 0, 1))

    torch.manual_seed(0)
    model, x = Net().double(), 10 * torch.randn(7, 3, dtype=torch.float64)
    result = rewrite.convert(model, [ClipChannels(), Rebalance("l2")], example_inputs=(x,))
    kinds = [type(module) for module in result.model.modules()]
    assert kinds.count(ChannelClip) == 2
    assert [change.after for change in result.report.changes].count("scaled for l2") == 2
    assert error(model, result.model, x) < RIGHT


def test_replayed_on_another_checkpoint_but_not_on_a_converted_one() -> None:
    model, other = clipped(), clipped(seed=3)
    result = rewrite.convert(
        model, [FoldNorm(), ClipChannels(), Rebalance("equalize")], example_inputs=(X,)
    )
    report = json.loads(result.report.to_json())
    result.model.load_state_dict(apply_report(report, other.state_dict()))
    assert error(other, result.model, X) < RIGHT
    only = rewrite.convert(model, [ClipChannels()], example_inputs=(X,))
    report = json.loads(only.report.to_json())
    with pytest.raises(CheckpointError, match=r"2\.bound already"):
        apply_report(report, only.model.state_dict())
    report["passes"][0]["changes"][0]["recipe"]["shape"] = [10**12]
    with pytest.raises(CheckpointError, match="shape"):
        apply_report(report, model.state_dict())


def test_saved_loaded_and_exported(tmp_path) -> None:
    model = clipped().float()
    result = rewrite.convert(model, [ClipChannels()], example_inputs=(X.float(),))
    rewrite.save(result.model, tmp_path / "m.pt")
    loaded = rewrite.load(tmp_path / "m.pt")
    assert torch.equal(loaded(X.float()), result.model(X.float()))
    rewrite.export(result.model, tmp_path / "m.onnx", example_inputs=(X.float(),))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(X.float()), rtol=1e-4, atol=1e-4)


class Declined(nn.Module):
    """A clip whose channels are unknown, one for two widths, one in place and read again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3 if kind == "widths" else 4)
        self.act = nn.ReLU6(inplace=kind == "again")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            return self.b(self.a(self.act(x)))
        if self.kind == "again":
            y = self.a(x)
            return self.act(y) + y
        return self.act(self.b(self.act(self.a(x))))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("input", "channels lie is unknown"),
        ("widths", "different channels"),
        ("again", "reads its input later"),
    ],
)
def test_declines(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    model, x = Declined(kind).double(), torch.randn(2, 3, dtype=torch.float64)
    result = rewrite.convert(model, [ClipChannels()], example_inputs=(x,))
    assert not result.report.changes and reason in result.report.skips[0].reason
    assert error(model, result.model, x) < RIGHT


def test_one_module_at_two_values_of_one_width_is_replaced_and_its_scales_stay() -> None:
    torch.manual_seed(0)
    model, x = Declined("plain").double(), 9 * torch.randn(6, 3, dtype=torch.float64)
    result = rewrite.convert(model, [ClipChannels(), Rebalance("l2")], example_inputs=(x,))
    assert [change.target for change in result.report.changes] == ["act"]
    assert error(model, result.model, x) < RIGHT


class AsksItsClip(nn.Module):
    """Code that asks something of the activation, which a clip with a bound a channel lacks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.clip, self.how = nn.Conv2d(3, 4, 1), nn.Hardtanh(0.0, 2.0), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.clip(self.conv(x))
        if self.how == "class":
            return y * 2 if isinstance(self.clip, nn.Hardtanh) else y
        return y * self.clip.max_val


@pytest.mark.parametrize("how", ["class", "bound"])
def test_an_activation_that_code_looks_at_stays(how: str) -> None:
    torch.manual_seed(0)
    model = AsksItsClip(how).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = rewrite.convert(model, ClipChannels(), example_inputs=x, verify=False)
    assert not result.report.changes and error(model, result.model, x) == 0
