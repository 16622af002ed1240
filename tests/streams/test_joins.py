"""Streams that are not joined by plain sums: factors of one number, lerp, and what is no sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.streams.blocks import Block, PreNorm, X, bare, centred, draw, error, rotated

Join = Callable[["Joined", torch.Tensor, torch.Tensor], torch.Tensor]


class Joined(Block):
    """A block whose two branches are joined to the stream by a function."""

    join: Join

    def __init__(self, norm: type[nn.Module], scale: bool, post: bool) -> None:
        super().__init__(norm, scale, post)
        self.alpha, self.beta = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(()))
        self.vector, self.gate = nn.Parameter(torch.rand(16)), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = type(self).join(self, x, self.attend(self.norm1(x)))
        return type(self).join(self, x, self.mlp(self.norm2(x)))


def joined(function: Join) -> type[Block]:
    """Return a class of blocks that are joined by a function."""
    return type("By", (Joined,), {"join": staticmethod(function)})


def gated(block: Joined, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + torch.sigmoid(block.gate(block.norm1(x))) * y


def gated_lerp(block: Joined, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.lerp(y, torch.tanh(block.gate(block.norm1(x))))


LINEAR: dict[str, Join] = {
    "factor on the left": lambda b, x, y: x + b.alpha * y,
    "factor on the right": lambda b, x, y: x + y * b.alpha,
    "factor without an axis": lambda b, x, y: x + b.beta * y,
    "both scaled": lambda b, x, y: b.beta * x + (1 - b.beta) * y,
    "divided": lambda b, x, y: x + y / b.alpha,
    "a gate of one number a token": gated,
    "add with alpha": lambda b, x, y: torch.add(x, y, alpha=3),
    "lerp of a number": lambda b, x, y: torch.lerp(x, y, 0.3),
    "lerp of a parameter": lambda b, x, y: x.lerp(y, b.beta),
    "lerp of one number a token": gated_lerp,
    "lerp the other way": lambda b, x, y: torch.lerp(y, x, b.alpha),
}

OTHER: dict[str, tuple[Join, str]] = {
    "lerp of a number a channel": (lambda b, x, y: torch.lerp(x, y, b.vector), "lerp"),
    "product": (lambda b, x, y: x * y, "mul"),
    "larger": (lambda b, x, y: torch.maximum(x, y), "maximum"),
    "chosen": (lambda b, x, y: torch.where(x > 0, x, y), "where"),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_a_stream_joined_linearly_is_turned_and_centred(kind: str) -> None:
    block = joined(LINEAR[kind])
    model = bare(block=block)
    result = rotated(model)
    assert len(result.report.changes) == 1 and not result.report.skips
    assert error(model, result.model, X) < 1e-12
    layers = draw(PreNorm(block=block))
    report = centred(layers)
    assert len(report.report.changes) == 1 and not report.report.skips
    assert error(layers, report.model, X) < 1e-12


@pytest.mark.parametrize("kind", OTHER)
def test_a_stream_joined_otherwise_is_left_by_the_name_of_what_joins_it(kind: str) -> None:
    join, name = OTHER[kind]
    for result, model in (
        (rotated, bare(block=joined(join))),
        (centred, draw(PreNorm(block=joined(join)))),
    ):
        report = result(model).report
        assert not report.changes
        (skip,) = report.skips
        assert skip.target == "positions" and f"joined by {name} in blocks.0" in skip.reason
        assert skip.reason.endswith("which is no sum")


def test_a_turned_stream_that_is_joined_otherwise_would_be_wrong() -> None:
    """What is declined matters: put through the rotation all the same, the output is another."""
    from rewrite.observe.stream_matrices import stream_map

    turn = stream_map({"kind": "hadamard", "size": 16, "seed": 0})
    x, y = torch.randn(2, 7, 16, dtype=torch.float64)
    for join, _ in OTHER.values():
        block = Joined(nn.RMSNorm, False, False).double()
        expected = turn(join(block, x, y))
        assert (join(block, turn(x), turn(y)) - expected).abs().max() > 1e-3
