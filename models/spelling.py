"""Norms spelled as functions, and norms subclassed with behaviour of their own."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.sharing import images


class FunctionalNorm(nn.Module):
    """`F.batch_norm` in a forward, on buffers and parameters with names of their own."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.gamma = nn.Parameter(torch.ones(8))
        self.beta = nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training, 0.1, 1e-3)
        return F.relu(x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class FunctionalNormDeep(nn.Module):
    """A functional norm inside a block, twice in a chain: only the block's code may change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(FunctionalNorm(), nn.Conv2d(8, 4, 1), FunctionalNorm())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 3, 9, 9),)


class TorchNorm(nn.Module):
    """`torch.batch_norm`, the spelling of exported and scripted code, without an affine."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.batch_norm(
            x, None, None, self.running_mean, self.running_var, self.training, 0.1, 1e-5, False
        )

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class FunctionalConv(nn.Module):
    """A norm module behind `F.conv2d` on a parameter of the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(images(8, 4, 3, 3, seed=3) / 6)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.kernel, padding=1))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BatchNormAct(nn.BatchNorm2d):
    """A norm that ends in an activation, as in timm: BatchNorm by class, more by behaviour."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.training or self.running_mean is None
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            statistics,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(self.drop(x))


class NormWithActivation(nn.Module):
    """A subclassed norm with the activation inside, written against the functional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.bn = BatchNormAct(8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class ScaledNorm(nn.BatchNorm2d):
    """A subclass that calls `super().forward` and then does something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5 + x


class NormCallsSuper(nn.Module):
    """A norm subclass whose forward wraps its parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = ScaledNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


MODELS = (
    FunctionalNorm,
    FunctionalNormDeep,
    TorchNorm,
    FunctionalConv,
    NormWithActivation,
    NormCallsSuper,
)
