"""Small copies of the building blocks of real architectures."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.sharing import images


class Residual(nn.Module):
    """A basic residual block: conv, norm, ReLU, conv, norm, addition, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 8, 6, 6),)


class PreActivation(nn.Module):
    """A pre-activation residual block: norms before the convolutions, after additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return F.relu(self.bn3(x + y)).mean(dim=(2, 3))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class ParallelBranches(nn.Module):
    """A RepVGG block: 3x3, 1x1 and identity branches, a norm in each, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn0 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + self.bn0(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 8, 6, 6),)


class DenseConnections(nn.Module):
    """A DenseNet layer: norms that read a concatenation of earlier values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(torch.cat([x, y], dim=1))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class SqueezeExcite(nn.Module):
    """An inverted residual with squeeze-and-excitation: a norm whose output is scaled by data."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)
        )
        self.project = nn.Conv2d(16, 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.expand(x)))
        y = F.silu(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y * self.gate(y).sigmoid()))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class Transformer(nn.Module):
    """A pre-norm transformer block: LayerNorm feeds q, k and v, and the feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8, bias=False)
        self.v = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm3 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 5, 8),)


class ResidualStream(nn.Module):
    """Blocks that add to a stream which begins at a linear layer: only LayerNorms read it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.norm1 = nn.LayerNorm(8)
        self.up1, self.down1 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        x = x + self.down1(F.gelu(self.up1(self.norm1(x))))
        return self.head(self.norm2(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 5, 6),)


class BareStream(nn.Module):
    """A stream between linear layers, whose RMSNorms have no weight; a LayerNorm stands outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.embed = nn.LayerNorm(6), nn.Linear(6, 8)
        self.norm1 = nn.RMSNorm(8, elementwise_affine=False)
        self.up1, self.down1 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm2 = nn.RMSNorm(8, elementwise_affine=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.first(x))
        x = x + self.down1(F.gelu(self.up1(self.norm1(x))))
        return self.head(self.norm2(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 5, 6),)


class BatchNormTransformer(nn.Module):
    """Linear layers with norms over the tokens, by transposing around them, as LeViT has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12, bias=False)
        self.bn1 = nn.BatchNorm1d(12)
        self.fc2 = nn.Linear(12, 8, bias=False)
        self.bn2 = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        y = F.hardswish(self.bn1(y.flatten(0, 1)).reshape_as(y))
        y = self.fc2(y)
        return x + self.bn2(y.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 5, 8),)


class OtherNorms(nn.Module):
    """GroupNorm, InstanceNorm with and without statistics, and RMSNorm: not batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.gn = nn.GroupNorm(4, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.inorm = nn.InstanceNorm2d(8, affine=True)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.tracked = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.rms = nn.RMSNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn(self.conv1(x)))
        x = F.relu(self.inorm(self.conv2(x)))
        x = F.relu(self.tracked(self.conv3(x)))
        return self.fc(self.rms(x.mean(dim=(2, 3))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class WithoutNorm(nn.Module):
    """A model in which there is nothing to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean(dim=(2, 3)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


MODELS = (
    Residual,
    PreActivation,
    ParallelBranches,
    DenseConnections,
    SqueezeExcite,
    Transformer,
    ResidualStream,
    BareStream,
    BatchNormTransformer,
    OtherNorms,
    WithoutNorm,
)
