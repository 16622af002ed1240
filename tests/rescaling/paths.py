"""Path norms by adding up every path: of chains of layers, written out in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import randomize_norms_
from rewrite.rescaling.path_norm import path_norms

RIGHT, WRONG = 1e-12, 1e-3


ORDERS = (1.0, 2.0, 3.0, math.inf)


def conv(options: dict[str, int]) -> nn.Module:
    return nn.Conv2d(2, 2, **options)


def edges(layer: Callable[[Tensor], Tensor], shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and bias of a layer that is affine on single positive values."""
    size = math.prod(shape)
    with torch.no_grad():
        bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
        columns = layer(basis).reshape(size, -1) - bias
    return columns.T.numpy(), bias.numpy()


Paths = list[np.ndarray]


def through(paths: Paths, matrix: np.ndarray, bias: np.ndarray) -> Paths:
    result = []
    for row, constant in zip(matrix, bias, strict=True):
        ways = [row[i] * paths[i] for i in np.flatnonzero(row)]
        if constant:
            ways.append(np.array([constant]))
        result.append(np.concatenate(ways) if ways else np.zeros(0))
    return result


def norm_of_paths(paths: Paths, p: float) -> float:
    every = np.abs(np.concatenate(paths))
    return float(every.max() if math.isinf(p) else (every**p).sum() ** (1 / p))


class Chain(nn.Module):
    """Steps one after the other; "skip" adds, "cat" concatenates what came two steps before."""

    def __init__(self, steps: Sequence[nn.Module | str]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.layers = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        before, layers = x, iter(self.layers)
        for step in self.steps:
            if step == "mark":
                before = x
            elif step == "skip":
                x = x + before
            elif step == "cat":
                x = torch.cat([x, before], 1)
            elif step == "double":
                x = 2 * x
            elif step == "mean":
                x = x.mean((2, 3))
            else:
                x = next(layers)(x)
        return x


def written_out(chain: Chain, shape: Sequence[int]) -> Paths:
    """Return every path of a chain: each layer's matrix is read off unit inputs."""
    paths: Paths = [np.ones(1) for _ in range(math.prod(shape))]
    before = paths
    for step in chain.steps:
        if step == "mark":
            before = paths
        elif step == "skip":
            paths = [np.concatenate(pair) for pair in zip(paths, before, strict=True)]
        elif step == "cat":
            paths = [*paths, *before]
            shape = (2 * shape[0], *shape[1:])
        else:
            layer = {"double": lambda x: 2 * x, "mean": lambda x: x.mean((2, 3))}.get(step, step)
            paths = through(paths, *edges(layer, shape))
            with torch.no_grad():
                shape = layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
    return paths


WITHOUT_WEIGHTS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(1.0),
    "max": lambda: nn.MaxPool2d(2, 1, padding=1),
    "max ceil": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "max dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "average": lambda: nn.AvgPool2d(2, 1, padding=1),
    "average without padding": lambda: nn.AvgPool2d(2, 2, padding=1, count_include_pad=False),
    "average ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True),
    "divisor": lambda: nn.AvgPool2d(2, 1, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d((2, 3)),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(size=(3, 5), mode="bilinear", align_corners=False),
    "corners": lambda: nn.Upsample(size=(4, 3), mode="bilinear", align_corners=True),
    "reflect": lambda: nn.ReflectionPad2d(1),
    "zeros": lambda: nn.ZeroPad2d((1, 0, 0, 1)),
    "constant": lambda: nn.ConstantPad2d((1, 0, 0, 0), 0.5),
    "flatten": lambda: nn.Flatten(2),
    "batch norm": lambda: nn.BatchNorm2d(2),
}


def random_chain(steps: Sequence[nn.Module | str], seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return randomize_norms_(Chain(steps).double().eval(), seed)


def agree(chain: Chain, shape: Sequence[int], ps: Sequence[float] = ORDERS) -> None:
    paths = written_out(chain, shape)
    found = path_norms(chain, tuple(ps), torch.zeros(1, *shape))
    for p in ps:
        assert found[p] == pytest.approx(norm_of_paths(paths, p), rel=RIGHT), p
