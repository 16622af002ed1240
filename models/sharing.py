"""Models in which a module, a tensor or a value has more than one user."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def images(*shape: int, seed: int = 7) -> Tensor:
    """Return seeded noise of a shape: an example input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SharedConv(nn.Module):
    """One convolution called twice, with a norm on one of the two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x.flip(-1)).tanh()

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class SharedConvAndNorm(nn.Module):
    """`bn(conv(x)) + bn(conv(y))`: both shared; a fold may happen, but once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(y)).relu()

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return images(2, 4, 6, 6), images(2, 4, 6, 6, seed=8)


class SharedNorm(nn.Module):
    """One norm behind two different convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        return self.bn(self.conv2(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class TwoNormsOneConv(nn.Module):
    """One call of a convolution that feeds two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn1(x).relu() + self.bn2(x).sigmoid()

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class NormUnderTwoNames(nn.Module):
    """One norm registered twice and called under both names; it must stay one module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = self.norm1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BlockUnderTwoNames(nn.Module):
    """A whole block registered twice: its norm has two qualified names, and one is called."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.stem = block
        self.stages = nn.ModuleList([block, nn.Conv2d(8, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.stages[1](self.stages[0](x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class TiedConvs(nn.Module):
    """Two convolutions that hold one weight tensor, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 8, 6, 6),)


class TiedEmbedding(nn.Module):
    """A language model's head tied to its embedding, with a norm behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hidden(self.embed(tokens)).transpose(1, 2)
        return self.head(self.norm(x).transpose(1, 2))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (torch.tensor([[1, 4, 2, 10, 0], [3, 3, 9, 5, 7]]),)


class EscapingConv(nn.Module):
    """The convolution's output is normalized, and also returned as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.conv(x)
        return self.bn(raw), raw

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BlockCalledInParts(nn.Module):
    """The block is called whole in one place; its convolution alone in another."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _ConvNorm(4, 4)
        self.out = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x)) + self.block.conv(x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class Recursion(nn.Module):
    """A forward that calls its own module again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return x if depth <= 1 else self(x, depth - 1)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 8, 6, 6),)


class NeverCalled(nn.Module):
    """A head with a norm that this forward never calls (it belongs to pre-training)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _ConvNorm(4, 8)
        self.pretext = _ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class PlainContainers(nn.Module):
    """Modules in a plain list and a plain dict, where `named_modules` does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.layers = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        self.heads = {"norm": nn.BatchNorm2d(8), "out": nn.Conv2d(8, 4, 1)}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.heads["out"](self.heads["norm"](x))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for module in (*self.layers, *self.heads.values()):
            module._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "PlainContainers":
        for module in (*self.layers, *self.heads.values()):
            module.train(mode)
        return super().train(mode)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BackReference(nn.Module):
    """A child that holds its parent in a tuple: walking plain attributes goes in a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _ConvNorm(4, 8)
        self.block.__dict__["owner"] = (self,)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class _ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


MODELS = (
    SharedConv,
    SharedConvAndNorm,
    SharedNorm,
    TwoNormsOneConv,
    NormUnderTwoNames,
    BlockUnderTwoNames,
    TiedConvs,
    TiedEmbedding,
    EscapingConv,
    BlockCalledInParts,
    Recursion,
    NeverCalled,
    PlainContainers,
    BackReference,
)
