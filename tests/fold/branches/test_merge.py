"""One sum of branches becomes one convolution; what only it used goes, and the rest stays."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_
from passes import MergeBranches
from rewrite.fold.branches.find import Branches
from rewrite.fold.branches.kernel import Merge
from rewrite.fold.branches.merge import merge_site
from rewrite.fold.replay import apply_report
from rewrite.graph.capture import capture
from rewrite.outcomes import Change

X = torch.randn(2, 4, 8, 8, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.b = nn.Conv2d(4, 4, 1)
        self.skip = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x) + self.skip(x))


class Net(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.block, self.again = Block(), again

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.tanh(x))
        return self.block.b(x) if self.again else x


def merged(model: nn.Module) -> tuple[Change, dict[str, Tensor], Tensor]:
    randomize_norms_(model)
    model.double().eval()
    want = model(X).detach()
    captured = capture(model)
    (merge,) = [m for m in Branches(captured).find() if isinstance(m, Merge)]
    change, exact = merge_site(captured, "reported", merge, {})
    captured.editor.commit()
    return change, {name: value() for name, value in exact.items()}, want


def test_the_model_computes_the_same_with_one_convolution() -> None:
    model = Net()
    _, exact, want = merged(model)
    assert (model(X) - want).abs().max() < 1e-13
    assert [type(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)] == [
        nn.Conv2d
    ]
    conv = model.block.merged_conv
    torch.testing.assert_close(exact["block.merged_conv.weight"], conv.weight)
    torch.testing.assert_close(exact["block.merged_conv.bias"], conv.bias)


def test_the_change_names_what_went_and_the_recipe_names_the_layer() -> None:
    change, _, _ = merged(Net())
    assert change.target == "reported" and change.after == "one convolution, block.merged_conv"
    assert change.keys["block.a.1.running_var"] is None and "block.skip.weight" in change.keys
    assert set(change.touched) >= {"block", "block.merged_conv", "block.a", "block.b"}
    assert change.recipe["do"] == "merge" and change.recipe["name"] == "block.merged_conv"


def test_a_layer_that_something_else_calls_stays() -> None:
    model = Net(again=True)
    change, _, want = merged(model)
    assert (model(X) - want).abs().max() < 1e-13
    assert isinstance(model.block.b, nn.Conv2d) and not hasattr(model.block, "a")
    assert not any(key.startswith("block.b.") for key in change.keys)


@pytest.mark.parametrize("trains", [True, False])
def test_the_convolution_trains_as_the_widest_one_did(trains: bool) -> None:
    model = Net()
    model.block.a[0].requires_grad_(trains)
    merged(model)
    assert {p.requires_grad for p in model.parameters()} == {trains}


class NormsASum(nn.Module):
    """A norm behind a sum of branches: of its terms one alone takes its shift."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.relu(self.norm(self.a(x) + x) + self.b(x))


def test_the_shift_of_a_norm_behind_a_sum_is_added_once() -> None:
    model = NormsASum()
    change, _, want = merged(model)
    assert (model(X) - want).abs().max() < 1e-13
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) and change.recipe


def test_such_a_recipe_is_the_same_on_another_checkpoint() -> None:
    other = NormsASum()
    torch.manual_seed(3)
    for value in other.state_dict().values():
        value.uniform_(0.5, 1.5) if value.is_floating_point() else value
    other.double().eval()
    model = NormsASum()
    randomize_norms_(model)
    result = rewrite.convert(model.double().eval(), MergeBranches(), example_inputs=X)
    report = json.loads(result.report.to_json())
    state = apply_report(report, other.state_dict())
    made = copy.deepcopy(result.model)
    made.load_state_dict(state)
    assert (made(X) - other(X)).abs().max() < 1e-12
    assert (made(X) - result.model(X)).abs().max() > 1e-3


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class ReadsWeight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b.weight.sum()


class ReadsNumber(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.b.out_channels


class WritesThroughState(Pair):
    def forward(self, x: Tensor) -> Tensor:
        for tensor in self.b.state_dict().values():
            tensor.mul_(0.5)
        return super().forward(x)


class WritesWeight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.b.weight.data.mul_(0.5)
        return y


@pytest.mark.parametrize(
    ("kind", "merges"),
    [(Pair, 1), (ReadsWeight, 1), (ReadsNumber, 1), (WritesThroughState, 0), (WritesWeight, 0)],
)
def test_a_layer_that_code_reads_stays_and_one_that_it_writes_is_not_merged(kind, merges) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    wanted = copy.deepcopy(model)
    result = rewrite.convert(model, MergeBranches(), example_inputs=X, verify=False)
    assert len(result.report.changes) == merges
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(result.model(X), wanted(X), rtol=0, atol=1e-12)
