"""Hooks, parametrizations, dtypes and memory formats."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from models.sharing import images
from rewrite.nn import WeightStandardization


def double_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Double what a module returns: a forward hook that no rewrite may lose."""
    return output * 2


def shift_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Shift what a module is given: a forward pre-hook that no rewrite may lose."""
    return (inputs[0] + 1, *inputs[1:])


class _ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.bn(self.conv(x))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class HookOnConv(_ConvNorm):
    """A forward hook on the convolution that feeds a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(double_output)


class HookOnNorm(_ConvNorm):
    """A forward hook on the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_hook(double_output)


class PreHookOnNorm(_ConvNorm):
    """A forward pre-hook on the norm: what it normalizes is not what the convolution returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_pre_hook(shift_input)


class HookOnParent(nn.Module):
    """A forward hook on a block: it must go on seeing what the block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
        self.block.register_forward_hook(double_output)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class ParametrizedConv(_ConvNorm):
    """A weight-normed convolution (the parametrization): its weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.conv)


class StandardizedConv(_ConvNorm):
    """A convolution under weight standardization: its weight is computed from three tensors."""

    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.conv, "weight", WeightStandardization())


class OldWeightNorm(_ConvNorm):
    """A convolution under the old `torch.nn.utils.weight_norm`, which is a forward pre-hook."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.nn.utils.weight_norm(self.conv)


class ParametrizedNorm(_ConvNorm):
    """A norm whose gamma is a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrize.register_parametrization(self.bn, "weight", _Exponential())


class Bfloat16(_ConvNorm):
    """A whole model in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6).to(torch.bfloat16),)


class Half(_ConvNorm):
    """A whole model in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.float16)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6).to(torch.float16),)


class MixedPrecision(nn.Module):
    """Half-precision convolutions around a norm that was kept in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3).to(torch.bfloat16)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x).to(torch.float32)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6).to(torch.bfloat16),)


class ChannelsLast(_ConvNorm):
    """A whole model in the channels-last memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6).to(memory_format=torch.channels_last),)


class TrainMode(_ConvNorm):
    """A whole model in train mode, as a checkpoint of an unfinished run is."""


class _Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


MODELS = (
    HookOnConv,
    HookOnNorm,
    PreHookOnNorm,
    HookOnParent,
    ParametrizedConv,
    StandardizedConv,
    OldWeightNorm,
    ParametrizedNorm,
    Bfloat16,
    Half,
    MixedPrecision,
    ChannelsLast,
    TrainMode,
)
