"""rewrite.path_norm over every operation that it supports, against all paths written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

import rewrite
from rewrite.errors import CaptureError
from rewrite.graph.traits import OPERATIONS, Call
from rewrite.rescaling.path_norm import path_norms
from rewrite.rescaling.path_operations import ADDS, MULTIPLIES, moves, passes

RIGHT = 1e-12
ORDERS = (1.0, 2.0, 3.0, math.inf)
SHAPE = (4, 2, 2)

Function = Callable[[Tensor], Tensor]

INDEX = torch.tensor([3, 0, 0, 2])
ROWS = torch.tensor([[[[1, 0], [0, 1]]]])


def least(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y]).amin(0)


def swapped(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([parts[1], parts[0]], 1)


ONE_OPERAND: dict[str, Function] = {
    "mul": lambda x: 3 * x, "div": lambda x: x / -4, "rsub": lambda x: torch.rsub(x, 2 * x),
    "neg": lambda x: -x, "clone": torch.clone, "identity": nn.Identity(),
    "detach": lambda x: x.detach(), "contiguous": lambda x: x.contiguous(),
    "positive": torch.positive, "cpu": lambda x: x.cpu(),
    "requires_grad": lambda x: x.requires_grad_(False), "to": lambda x: x.to(torch.float64),
    "type": lambda x: x.type(torch.float64), "float": lambda x: x.float(),
    "double": lambda x: x.double(), "half": lambda x: x.half(), "bfloat16": lambda x: x.bfloat16(),
    "type_as": lambda x: x.type_as(x), "dropout": lambda x: F.dropout(x, 0.5, False),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, False), "relu": torch.relu,
    "abs": torch.abs, "prelu": nn.PReLU(4), "leaky_relu": lambda x: F.leaky_relu(x, -0.5),
    "rrelu": lambda x: F.rrelu(x, training=False), "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: x.clamp_min(0), "threshold": lambda x: F.threshold(x, 0, 0),
    # -- pools, resizing and reductions
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 2, 1, 1, False, False),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, 1, 1),
    "avg_pool3d": lambda x: F.avg_pool3d(x.unsqueeze(1), 2, 1, 1),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 3),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (1, 3)),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x.unsqueeze(1), (3, 1, 2)),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 2, 1, 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 2, 1, 1),
    "max_pool3d": lambda x: F.max_pool3d(x.unsqueeze(1), 2, 1),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (1, 3)),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x.unsqueeze(1), (3, 1, 2)),
    "interpolate": lambda x: F.interpolate(x, size=3, mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)), "mean": lambda x: x.mean((1, 3)),
    "sum": lambda x: x.sum(1, keepdim=True), "amax": lambda x: x.amax((2, 3)),
    # -- values elsewhere
    "unfold": lambda x: F.unfold(x, 2, padding=1), "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, 2), "t": lambda x: x.flatten(1).t().reshape(1, -1),
    "movedim": lambda x: x.movedim(1, -1), "narrow": lambda x: x.narrow(1, 1, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2), "rot90": lambda x: x.rot90(1, (2, 3)),
    "index_select": lambda x: x.index_select(1, INDEX),
    "gather": lambda x: x.gather(2, ROWS.expand(1, 4, 2, 2)), "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1, 3), "flatten": lambda x: x.flatten(2),
    "view": lambda x: x.view(1, 2, 8), "expand": lambda x: x.sum(2, True).expand(1, 4, 3, 2),
    "repeat": lambda x: x.repeat(1, 2, 1, 1), "tile": lambda x: x.tile((1, 1, 2, 1)),
    "reshape_as": lambda x: x.reshape_as(x), "expand_as": lambda x: x.expand_as(x),
    "unsqueeze": lambda x: x.unsqueeze(2), "squeeze": lambda x: x.sum(2, True).squeeze(2),
    "unflatten": lambda x: x.unflatten(1, (2, 2)), "select": lambda x: x.select(1, 2),
    "getitem": lambda x: x[:, 1:, 0], "chunk": lambda x: swapped(x.chunk(2, 1)),
    "split": lambda x: swapped(x.split([1, 3], 1)),
    "tensor_split": lambda x: swapped(torch.tensor_split(x, 2, 1)),
    "unbind": lambda x: swapped(x.unbind(2)),
}  # fmt: skip
"""By canonical name: what is affine on single positive values, where max and relu are."""

TWO_OPERANDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "maximum": torch.maximum, "minimum": torch.minimum,
    "cat": lambda x, y: torch.cat([y, x], 1), "stack": lambda x, y: torch.stack([y, x], 1),
}  # fmt: skip

REFUSED: dict[str, Function] = {
    f"{kind}{dims}d{rest}": function
    for dims in (1, 2, 3)
    for kind, rest, function in (
        ("lp_pool", "", lambda x: F.lp_pool2d(x, 2, 2)),
        ("max_unpool", "", lambda x: F.max_unpool2d(x, ROWS.expand(1, 4, 2, 2), 2)),
        ("max_pool", "_with_indices", lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
        (
            "adaptive_max_pool", "_with_indices",
            lambda x: F.adaptive_max_pool2d(x, 1, return_indices=True)[0],
        ),
    )
}  # fmt: skip

ELSEWHERE = {
    "cuda": "there is none", "slice": "only an exported graph has it",
    "amin": "with the maximum, of which it has the paths", "stochastic_depth": "of torchvision",
    "drop_path": "of timm", "fold": "adds up values that meet",
}  # fmt: skip
"""Tested below or not at all, and why."""


def supported() -> set[str]:
    """Return the names of the rows of the table that `path_norm` has a rule for."""
    node = Graph().placeholder("x")
    found = {"clamp", "clamp_min", "threshold"}
    for row in OPERATIONS:
        call = Call(row, node, None)
        named = row.name in {
            *ADDS,
            *MULTIPLIES,
            "mean",
            "sum",
            "amax",
            "amin",
            "interpolate",
            "pad",
        }
        if named or passes(call) or moves(call) or "pool" in row.name:
            found.add(row.name)
    return found


def test_every_supported_operation_is_in_a_table() -> None:
    tables = {*ONE_OPERAND, *TWO_OPERANDS, *REFUSED, *ELSEWHERE}
    assert supported() - tables == set()
    assert tables - supported() - {"fold"} == set()


class One(nn.Module):
    def __init__(self, function: Function, outputs: int) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(2, 4, 1), function
        self.last = nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(self.function(x).reshape(1, -1).double())


class Two(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], outputs: int) -> None:
        super().__init__()
        self.first, self.other, self.function = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), function
        self.last = nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(torch.relu(self.first(x)), self.other(x))
        return self.last(x.flatten(1))


# -- all paths, one number each -------------------------------------------------------------------

Paths = list[np.ndarray]


def matrix(function: Function, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and bias of what is affine on single positive values, one at a time."""
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).view(size, 1, *shape)
    with torch.no_grad():
        bias = function(torch.zeros(1, *shape, dtype=torch.float64)).double().flatten()
        columns = torch.stack([function(unit).double().flatten() - bias for unit in basis], 1)
    return columns.numpy(), bias.numpy()


def through(paths: Paths, function: Function, shape: tuple[int, ...]) -> Paths:
    found: Paths = []
    for row, constant in zip(*matrix(function, shape), strict=True):
        ways = [row[i] * paths[i] for i in np.flatnonzero(row)]
        found.append(np.concatenate([*ways, [constant] if constant else []]))
    return found


def last(paths: Paths, layer: nn.Linear) -> Paths:
    return through(paths, layer, (len(paths),))


def agree(model: nn.Module, paths: Paths) -> None:
    every = np.abs(np.concatenate(paths))
    found = path_norms(model, ORDERS, torch.zeros(1, 2, 2, 2))
    for p in ORDERS:
        wanted = every.max() if math.isinf(p) else (every**p).sum() ** (1 / p)
        assert found[p] == pytest.approx(wanted, rel=RIGHT), p


@pytest.mark.parametrize("name", ONE_OPERAND)
def test_one_operand(name: str) -> None:
    torch.manual_seed(0)
    function = ONE_OPERAND[name]
    size = function(torch.ones(1, *SHAPE)).numel()
    model = One(function, size).double().eval()
    start = through([np.ones(1)] * 8, model.first, (2, 2, 2))
    middle = through(start, function, SHAPE)
    if name == "rsub":  # 2 x - x: each of both is on a path
        middle = [np.concatenate([2 * p, p]) for p in start]
    agree(model, last(middle, model.last))


@pytest.mark.parametrize("name", [*TWO_OPERANDS, "amin"])
def test_two_operands(name: str) -> None:
    torch.manual_seed(0)
    function = least if name == "amin" else TWO_OPERANDS[name]
    outputs = function(torch.ones(1, *SHAPE), torch.ones(1, *SHAPE)).numel()
    model = Two(function, outputs).double()
    one = through([np.ones(1)] * 8, model.first, (2, 2, 2))
    other = through([np.ones(1)] * 8, model.other, (2, 2, 2))
    if name in ("cat", "stack"):
        middle = [*other, *one]
    else:
        middle = [np.concatenate(pair) for pair in zip(one, other, strict=True)]
    agree(model, last(middle, model.last))


def test_stochastic_depth_is_the_identity_in_eval_mode() -> None:
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    model = One(ops.StochasticDepth(0.5, "row"), 16).double().eval()
    start = through([np.ones(1)] * 8, model.first, (2, 2, 2))
    agree(model, last(start, model.last))


@pytest.mark.parametrize("name", ["lp_pool2d", "max_unpool2d", "max_pool2d_with_indices"])
def test_a_pool_that_adds_up_no_paths_is_refused(name: str) -> None:
    model = One(REFUSED[name], 16).double()
    with pytest.raises(CaptureError, match=r"test_every_operation\.py:"):
        rewrite.path_norm(model, 2, torch.zeros(1, 2, 2, 2))
