"""Norms that are not quite a plain BatchNorm2d behind a plain convolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.sharing import images


class LinearNorm(nn.Module):
    """Linear, then BatchNorm1d on (N, C): one element a channel and sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.bn1 = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.bn1(self.fc1(x))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(4, 6),)


class LinearNormSquare(nn.Module):
    """Linear, then BatchNorm1d on (N, C, L) with C == L: the norm's axis is not the layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(3, 8, 8),)


class Norm1d(nn.Module):
    """A 1-d convolution and its norm on (N, C, L), dilated and strided."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, stride=2, dilation=2, padding=2)
        self.bn = nn.BatchNorm1d(8, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 12),)


class Norm3d(nn.Module):
    """A 3-d convolution and its norm on (N, C, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 2, 4, 4, 4),)


class GroupedTranspose(nn.Module):
    """A grouped transposed convolution: its weight is (inputs, outputs / groups, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4, output_padding=1)
        self.bn = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 8, 4, 4),)


class Depthwise(nn.Module):
    """A depthwise-separable block: a depthwise and a pointwise convolution, a norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 16, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.depthwise(x)))
        return F.relu6(self.bn2(self.pointwise(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 8, 6, 6),)


class ConvReluNorm(nn.Module):
    """conv, ReLU, norm beside conv, norm: what was registered together need not be connected."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(F.relu(self.conv1(x))) + F.relu(self.bn2(self.conv2(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class NormFirst(nn.Module):
    """A norm before a zero-padded, a reflecting and an unpadded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 8, 1, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.bn3 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(self.bn1(x)))
        x = F.relu(self.conv2(self.bn2(x)))
        return self.conv3(self.bn3(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class NormNorm(nn.Module):
    """Two norms in a row behind one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class TrainModeNorm(nn.Module):
    """An eval model in which one norm was left in train mode, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.eval()
        self.bn2.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class WithoutStatistics(nn.Module):
    """`track_running_stats=False`: batch statistics in eval too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class AffineFree(nn.Module):
    """`affine=False`: no gamma and no beta."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BiasFree(nn.Module):
    """A norm with a gamma whose beta is None, while `affine` still says True."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.bn.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class FrozenNorm(nn.Module):
    """gamma and beta do not require gradients; those of the convolution do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class LazyNorms(nn.Module):
    """Lazy layers that a first batch has materialized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(8, 3)
        self.bn = nn.LazyBatchNorm2d()
        self.fc = nn.LazyLinear(6)
        self.bn1 = nn.LazyBatchNorm1d()
        self.eval()
        with torch.no_grad():
            self(*self.example_inputs())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.bn1(self.fc(x.mean(dim=(2, 3))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class SyncNorm(nn.Module):
    """SyncBatchNorm, which runs on the CPU in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.SyncBatchNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class PixelMaps(nn.Module):
    """Norms on 1x1 maps: InstanceNorm there would output beta, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 6)
        self.bn1 = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        return self.bn2(self.squeeze(x)).flatten(1)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class PrimeChannels(nn.Module):
    """7 channels: no number of groups but 1 leaves more than one channel a group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 7, 3)
        self.bn = nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 7)
        self.bn1 = nn.BatchNorm1d(7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.bn1(self.fc(x.mean(dim=(2, 3))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class ExtremeStatistics(nn.Module):
    """Running variances of 0.0 and 5.6e-45 and a negative and a zero gamma, as checkpoints have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3)
        assert self.bn.running_var is not None
        with torch.no_grad():
            self.conv.weight[:2] *= 1e-3
            self.bn.running_var[0] = 0.0
            self.bn.running_var[1] = 5.6e-45
            self.bn.weight[2] = -1.25
            self.bn.weight[3] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


MODELS = (
    LinearNorm,
    LinearNormSquare,
    Norm1d,
    Norm3d,
    GroupedTranspose,
    Depthwise,
    ConvReluNorm,
    NormFirst,
    NormNorm,
    TrainModeNorm,
    WithoutStatistics,
    AffineFree,
    BiasFree,
    FrozenNorm,
    LazyNorms,
    SyncNorm,
    PixelMaps,
    PrimeChannels,
    ExtremeStatistics,
)
