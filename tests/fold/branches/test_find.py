"""Which parallel branches can be merged, and why others that look alike cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.randomize import randomize_norms_
from rewrite.fold.branches.find import Branches
from rewrite.fold.branches.kernel import Merge
from rewrite.graph.capture import capture
from rewrite.outcomes import Declined


class Two(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.relu(self.a(x) + self.b(x))


class Identity(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.relu(self.a(x) + self.b(x) + x)


class ReadInside(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = self.a(x)
        return torch.relu(y + self.b(x)) * torch.sigmoid(y)


class Writes(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = self.a(x)
        x.add_(1)
        return torch.relu(y + self.b(x))


class AsksShape(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.relu((self.a(x) + self.b(x)).reshape(x.shape[0], -1))


class Apart(Two):
    """Branches of two values."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(torch.tanh(x)) + self.b(torch.sin(x)))


def conv(kernel: int = 3, outputs: int = 4, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", (kernel - 1) // 2)
    return nn.Conv2d(4, outputs, kernel, **options)


def found(model: nn.Module) -> list[Merge | Declined]:
    randomize_norms_(model)
    captured = capture(model.double().eval(), example_inputs=torch.randn(1, 4, 8, 8).double())
    return list(Branches(captured).find())


def normed(layer: nn.Conv2d) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


@pytest.mark.parametrize(
    ("model", "terms"),
    [
        (Two(conv(), conv(1)), 2),
        (Two(normed(conv()), normed(conv(1))), 2),
        (Identity(conv(), nn.BatchNorm2d(4)), 3),
        (AsksShape(conv(), conv(1)), 2),
        (Two(conv(stride=2), conv(1, stride=2)), 2),
        (Two(conv(groups=2), conv(1, groups=2)), 2),
    ],
)
def test_branches_that_see_one_window_are_merged(model: nn.Module, terms: int) -> None:
    (merge,) = found(model)
    assert isinstance(merge, Merge), merge
    assert len(merge.terms) == terms and merge.source.name == "tanh" and merge.owner == ""
    assert merge.outer.target == ("a.0" if isinstance(model.a, nn.Sequential) else "a")
    assert merge.root in merge.inside and merge.source not in merge.inside


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Two(conv(stride=2), conv(1, stride=2, groups=2)), "groups=2"),
        (Two(conv(), conv(padding_mode="reflect")), "padding_mode="),
        (Two(conv(padding="same"), conv(1)), "padding='same'"),
        (Two(conv(padding=2, dilation=2), conv()), "different dilations"),
        (Two(conv(padding=1), conv(5, padding=1)), "see different windows"),
        (Two(conv(), conv(1, outputs=1)), "b writes 1 channels, a 4"),
        (Two(conv(1, outputs=1), conv(1)), "b writes 4 channels, a 1"),
        (ReadInside(conv(), conv(1)), "is also read outside of the branches"),
        (Writes(conv(), conv(1)), "writes into what the branches read"),
    ],
)
def test_branches_that_look_alike_are_declined_with_the_reason(
    model: nn.Module, reason: str
) -> None:
    (outcome,) = found(model)
    assert isinstance(outcome, Declined) and reason in outcome.reason, outcome
    assert outcome.nodes and outcome.nodes[0].name.startswith("add")


def test_a_hook_inside_is_a_reason() -> None:
    model = Two(conv(), conv(1))
    model.b.register_forward_hook(lambda *args: None)
    (outcome,) = found(model)
    assert isinstance(outcome, Declined) and "hook" in outcome.reason


@pytest.mark.parametrize(
    "model",
    [
        Apart(conv(), conv(1)),
        Two(nn.BatchNorm2d(4), nn.Identity()),
        Two(nn.Sequential(conv(), nn.ReLU()), conv(1)),
        nn.Sequential(conv(), nn.ReLU()),
    ],
)
def test_what_is_no_sum_of_parallel_convolutions_is_nothing(model: nn.Module) -> None:
    assert found(model) == []


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Two(conv(), conv(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_a_block_that_is_called_twice_is_merged_once_with_all_its_calls() -> None:
    (merge,) = found(Twice())
    assert isinstance(merge, Merge) and merge.owner == "block"
    assert sum("add" in node.name for node in merge.inside) == 2


def test_a_merge_can_be_read_again_with_the_tensors_of_now() -> None:
    model = Identity(conv(), nn.BatchNorm2d(4)).double().eval()
    branches = Branches(capture(model))
    (merge,) = branches.find()
    assert isinstance(merge, Merge)
    with torch.no_grad():
        model.b.weight.mul_(3)
    again = branches.again(merge)
    assert torch.equal(again.terms[1].affine.scale, merge.terms[1].affine.scale * 3)
    assert again.root is merge.root and again.inside == merge.inside
