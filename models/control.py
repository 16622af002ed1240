"""Models whose forward is more than a straight line: control flow, odd arguments, odd outputs."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from models.sharing import images


class BranchingLeaf(nn.Module):
    """Control flow on values in a module without children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.gate = _Gate()
        self.out = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(self.bn(self.conv(x))))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BranchingParent(nn.Module):
    """Control flow on values in a block that has a convolution and norms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.block = _BranchingBlock()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class BranchingRoot(nn.Module):
    """Control flow on values in the outermost forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.high = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > 1e6:
            return self.high(x)
        return self.low(x)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class IteratedProxy(nn.Module):
    """A forward that loops over the slices of its input: the length is not known when traced."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)
        self.bn = nn.BatchNorm1d(5)

    def forward(self, video: Tensor) -> Tensor:
        features = [self.frame(frame).mean(dim=(2, 3)) for frame in video]
        return self.bn(self.fc(torch.stack(features).mean(dim=0)))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(3, 2, 4, 6, 6),)


class StarArguments(nn.Module):
    """`*args` and `**kwargs` in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, *xs: Tensor, **options: float) -> Tensor:
        return self.bn(self.conv(xs[0])) * options.get("scale", 1.0) + xs[1]

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return images(2, 4, 6, 6), images(2, 8, 1, 1, seed=8)


class OptionalInput(nn.Module):
    """`if mask is None` on an argument that has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.bn(self.conv(x))
        if mask is None:
            return F.relu(x)
        return x * mask

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class ShapeChecks(nn.Module):
    """Asserts and arithmetic on the shape of the input, as detection and vision models have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if h % 2 or w % 2:
            raise ValueError("height and width must be even")
        x = self.bn(self.conv(x))
        return x.reshape(n, 8, h // 2, 2, w // 2, 2).mean(dim=(3, 5))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class NestedOutputs(nn.Module):
    """A detection-like list of dicts with boxes, integer labels and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.scores = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.backbone(x).mean(dim=(2, 3))
        scores = self.scores(features)
        return {
            "detections": [{"boxes": self.boxes(features), "labels": scores.argmax(dim=1)}],
            "aux": (scores, {"features": features}),
        }

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(3, 4, 6, 6),)


class DictInput(nn.Module):
    """One argument, a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.bn(self.conv(batch["image"])) + batch["offset"]

    @staticmethod
    def example_inputs() -> tuple[Any, ...]:
        return ({"image": images(2, 4, 6, 6), "offset": images(1, 8, 1, 1, seed=8)},)


class RegistrationOrder(nn.Module):
    """Modules registered in another order than the one in which they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_a = nn.BatchNorm2d(8)
        self.conv_b = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_a = nn.Conv2d(4, 8, 3, padding=1)
        self.bn_b = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_b(self.conv_a(x)))
        return self.bn_a(self.conv_b(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class Dropout(nn.Module):
    """Functional and module dropout that must still switch on when the result is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn(self.conv(x)))
        return F.dropout(x, 0.5, self.training)

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


def graph_module_root() -> fx.GraphModule:
    """Return a model that is a GraphModule already, of a residual block with two norms."""
    from models.blocks import Residual

    return fx.symbolic_trace(Residual().eval())


class GraphModuleInside(nn.Module):
    """A GraphModule as a child of an ordinary module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.body = graph_module_root()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))

    @staticmethod
    def example_inputs() -> tuple[Tensor, ...]:
        return (images(2, 4, 6, 6),)


class _Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e6 else F.relu(x)


class _BranchingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        if y.abs().max() > 1e6:
            y = y.clamp(-1, 1)
        return x + self.branch(y)


MODELS = (
    BranchingLeaf,
    BranchingParent,
    BranchingRoot,
    IteratedProxy,
    StarArguments,
    OptionalInput,
    ShapeChecks,
    NestedOutputs,
    DictInput,
    RegistrationOrder,
    Dropout,
    GraphModuleInside,
)
