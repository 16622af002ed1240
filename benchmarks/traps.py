"""What the scoreboard adds to `models`: small models that break naive folding, one trap each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import models

Trap = tuple[nn.Module, tuple[Any, ...]]

FOLD = (
    "shared_conv", "shared_conv_and_norm", "shared_norm", "two_norms_one_conv", "tied_convs",
    "norm_under_two_names", "block_under_two_names", "escaping_conv", "linear_norm_square",
    "conv_with_bias", "affine_free", "bias_free", "norm_before_linear", "norm_before_padded_conv",
    "norm_before_padded_1x1", "norm_before_reflecting_conv", "norm_first", "norm_norm",
    "grouped_transpose", "depthwise", "conv_relu_norm", "registration_order",
    "norm_with_activation", "functional_norm", "functional_norm_deep", "train_mode_norm",
    "without_statistics", "extreme_statistics", "hook_on_conv", "hook_on_norm",
    "pre_hook_on_norm", "parametrized_conv", "old_weight_norm", "sync_norm", "frozen_norm",
    "bfloat16", "half", "channels_last", "branching_parent", "plain_containers",
    "parallel_branches", "batch_norm_transformer", "squeeze_excite", "constants_per_channel",
    "cat_norm",
)  # fmt: skip
SWAP = (
    "residual", "norm_under_two_names", "norm_with_activation", "functional_norm", "affine_free",
    "frozen_norm", "prime_channels", "pixel_maps", "linear_norm", "plain_containers",
    "train_mode_norm", "bfloat16", "half", "sync_norm", "registration_order", "never_called",
)  # fmt: skip


def build(name: str) -> Trap:
    """Return a trap with randomized norms, in float64 unless the dtype is its point."""
    if name not in _OWN:
        return models.build(name)
    torch.manual_seed(0)
    model, inputs = _OWN[name]()
    return models.randomize_norms_(model).double().eval(), tuple(x.double() for x in inputs)


def _image(channels: int = 3) -> tuple[Tensor]:
    return (torch.randn(2, channels, 8, 8),)


def _conv_with_bias() -> Trap:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU()), _image()


def _norm_before_linear() -> Trap:
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False))
    return nn.Sequential(*layers), (torch.randn(5, 6),)


def _norm_before_conv(kernel: int, **options: Any) -> Callable[[], Trap]:
    def make() -> Trap:
        conv = nn.Conv2d(3, 8, kernel, **options)
        return nn.Sequential(nn.BatchNorm2d(3), conv, nn.ReLU()), _image()

    return make


class _ConstantsPerChannel(nn.Module):
    """torchvision's frozen norm, then a LayerScale in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.frozen = FrozenBatchNorm2d(8)
        for buffer in self.frozen.buffers():
            buffer.uniform_(0.5, 2)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.frozen(self.conv1(x)))
        return x + self.gamma * self.conv2(x)


class _CatNorm(nn.Module):
    """One norm behind the concatenation of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(torch.cat([self.left(x), self.right(x)], 1)))


_OWN: dict[str, Callable[[], Trap]] = {
    "conv_with_bias": _conv_with_bias,
    "norm_before_linear": _norm_before_linear,
    "norm_before_padded_conv": _norm_before_conv(3, padding=1),
    "norm_before_padded_1x1": _norm_before_conv(1, padding=1),
    "norm_before_reflecting_conv": _norm_before_conv(3, padding=1, padding_mode="reflect"),
    "constants_per_channel": lambda: (_ConstantsPerChannel(), _image()),
    "cat_norm": lambda: (_CatNorm(), _image()),
}
