"""passes.merge_branches: parallel branches are one convolution, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from passes import FoldNorm, MergeBranches
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model

RIGHT, WRONG = 1e-10, 1e-3


class Block(nn.Module):
    """Branches b0, b1 ... of one value, added up by `join`."""

    def __init__(self, *branches: nn.Module, join: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        values = [branch(x) for branch in self.branches]
        if self.join is not None:
            return torch.relu(self.join(*values))
        total = values[0]
        for value in values[1:]:
            total = total + value
        return torch.relu(total)


def conv(kernel: int, outputs: int = 4, norm: bool = True, **options: Any) -> nn.Module:
    layer = nn.Conv2d(4, outputs, kernel, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs)) if norm else layer


def check(model: nn.Module, *passes: Any, channels: int = 4) -> tuple[nn.Module, Applied]:
    model = models.randomize_norms_(nn.Sequential(model)).double().eval()
    x = torch.randn(2, channels, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        merged = copy_model(model)
        for item in passes or (MergeBranches(),):
            applied = apply_pass(item, merged, (x,))
            merged = applied.model
        error = (merged(x) - want).abs().max() / want.abs().max()
    assert error < RIGHT
    return merged, applied


def convs(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    "branches",
    [
        (lambda: (conv(3, padding=1), conv(1), nn.BatchNorm2d(4))),
        (lambda: (conv(3, padding=1), nn.Identity())),
        (lambda: (conv(3, padding=1, groups=2), conv(1, groups=2), nn.Identity())),
        (lambda: (conv(5, padding=2, groups=4), conv(3, padding=1, groups=4), nn.BatchNorm2d(4))),
        (lambda: (conv(3, 6, padding=1, stride=2), conv(1, 6, stride=2))),
        (lambda: (conv(3, padding=2, dilation=2), conv(1), nn.Identity())),
        (lambda: (conv(3, padding=1, norm=False, bias=False), conv(1, norm=False))),
        (lambda: (conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0)), conv(3, padding=1))),
        (lambda: (conv(3, padding=1, padding_mode="reflect"), conv(1, padding_mode="reflect"))),
        (lambda: (conv(2), conv(2))),
    ],
)  # fmt: skip
def test_merges(branches: Callable[[], tuple[nn.Module, ...]]) -> None:
    merged, applied = check(Block(*branches()))
    assert len(convs(merged)) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert len(applied.changes) == 1
    assert [key for key in merged.state_dict() if "merged_conv" not in key] == []


def test_merges_a_difference_and_a_scaled_branch() -> None:
    class Mixer(Block):
        def __init__(self) -> None:
            super().__init__(conv(3, padding=1), nn.BatchNorm2d(4))
            self.gamma = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            return x + self.gamma * (self.branches[0](x) - self.branches[1](x))

    merged, _ = check(Mixer())
    assert len(convs(merged)) == 1


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        (lambda: (conv(3), conv(3, dilation=1, padding_mode="reflect")), "padding_mode"),
        (lambda: (conv(3, padding=1), conv(1, groups=2)), "groups"),
        (lambda: (conv(3, padding=1, dilation=1), conv(3, padding=2, dilation=2)), "dilations"),
        (lambda: (conv(2, padding=1, stride=2), conv(1, stride=2)), "windows"),
        (lambda: (conv(3, padding=1, padding_mode="zeros"), conv(3, padding="same")), "padding"),
    ],
)
def test_declines_with_the_reason(branches: Any, words: str) -> None:
    class Sums(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            one, other = (branch(x) for branch in self.branches)
            return one + other

    merged, applied = check(Sums(*branches()))
    assert len(convs(merged)) == 2
    assert words in applied.skips[0].reason


def test_declines_a_branch_that_is_read_elsewhere() -> None:
    block = Block(conv(3, padding=1), conv(1), join=lambda a, b: (a + b) * torch.sigmoid(a))
    merged, applied = check(block)
    assert len(convs(merged)) == 2
    assert "also read outside" in applied.skips[0].reason


def test_declines_a_hook() -> None:
    block = Block(conv(3, padding=1, norm=False), conv(1, norm=False))
    block.branches[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    merged, applied = check(block)
    assert len(convs(merged)) == 2
    assert not applied.changes


def test_leaves_nonlinear_branches_alone() -> None:
    block = Block(nn.Sequential(conv(3, padding=1), nn.ReLU()), conv(1))
    merged, applied = check(block)
    assert not applied.changes
    assert len(convs(merged)) == 2


def test_fold_merges_by_default() -> None:
    model, inputs = models.build("parallel_branches")
    folded = apply_pass(FoldNorm(), copy_model(model), inputs)
    kept = apply_pass(FoldNorm(merge=False), copy_model(model), inputs)
    assert not folded.skips
    assert len(kept.skips) == 1
    with torch.no_grad():
        want = model(*inputs)
        assert ((folded.model(*inputs) - want).abs().max() / want.abs().max()) < RIGHT


def test_agrees_with_timm_on_the_number_of_convolutions() -> None:
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    torch.manual_seed(0)
    model = models.randomize_norms_(timm.create_model("repvgg_a0")).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    folded = apply_pass(FoldNorm(), copy_model(model), (x,)).model
    theirs = reparameterize_model(model)
    with torch.no_grad():
        want = model(x)
        assert ((folded(x) - want).abs().max() / want.abs().max()) < RIGHT
    assert len(convs(folded)) == len(convs(theirs))


def test_a_kernel_in_the_wrong_place_would_show() -> None:
    """The negative twin: a 1x1 kernel one tap off is another function."""
    block = Block(conv(3, padding=1, norm=False), conv(1, norm=False)).double().eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        want = block(x)
        wide, point = block.branches
        wrong = wide.weight.clone()
        wrong[:, :, :1, :1] += point.weight
        got = torch.relu(
            nn.functional.conv2d(torch.tanh(x), wrong, wide.bias + point.bias, padding=1)
        )
    assert (got - want).abs().max() / want.abs().max() > WRONG


class Skip(nn.Module):
    """x + module(x), as the positional encodings of hybrid transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = conv(3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


class Wrapper(nn.Module):
    """Calls nothing but the block whose forward adds: it must outlive the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = Skip()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x)


def test_a_module_around_the_one_that_adds_stays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), Wrapper(), nn.Conv2d(4, 4, 1))
    merged, applied = check(model)
    assert len(applied.changes) == 1
    assert [type(child).__name__ for child in merged[0]] == ["Conv2d", "GELU", "Wrapper", "Conv2d"]
