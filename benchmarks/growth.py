"""How the cost of each pass grows with the model: linearly is right.

    python -m benchmarks.growth             milliseconds a block, at three sizes
    python -m benchmarks.growth --write     and put them into docs/benchmarks.md

Chains of blocks with a skip, a convolution, a norm and a ReLU6 each are converted with an example
input, without and with verification (which runs the model, so its own cost grows too). The time is
CPU time of one thread, the least of two runs; "growth" is the cost a block in the largest chain
over that in the smallest: 1 is linear, 4 would be a cost that grows with the square.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import rewrite
from benchmarks._table import environment, parser, publish, table
from models import randomize_norms_
from rewrite.errors import RewriteError
from rewrite.registry import entries

SIZES = (50, 100, 200)


class _Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.norm(self.conv(x))))


def chain(blocks: int) -> nn.Module:
    """Return a network of so many blocks, in eval mode, with random norms."""
    torch.manual_seed(0)
    return randomize_norms_(nn.Sequential(*(_Block() for _ in range(blocks)))).eval()


def cost(name: str, blocks: int, *, verify: bool) -> float:
    """Return the seconds of CPU that a conversion takes, the least of two."""
    x, least = torch.randn(1, 8, 4, 4), float("inf")
    for _ in range(2):
        model = chain(blocks)
        gc.collect()
        start = time.process_time()
        with contextlib.suppress(RewriteError):
            rewrite.convert(model, name, example_inputs=x, verify=verify)
        least = min(least, time.process_time() - start)
    return least


def rows(names: Sequence[str]) -> Iterator[list[object]]:
    """Yield a row a pass."""
    for name in names:
        row: list[object] = [name]
        for verify in (False, True):
            costs = [1e3 * cost(name, blocks, verify=verify) / blocks for blocks in SIZES]
            row += [*(f"{c:.2f}" for c in costs), f"{costs[-1] / costs[0]:.2f}"]
        yield row


def main() -> None:
    """Print the table, and write it when asked to."""
    options = parser(__doc__)
    options.add_argument("passes", nargs="*", metavar="PASS", default=sorted(entries()))
    chosen = options.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sizes = [f"{n} blocks" for n in SIZES]
    header = ["pass, ms a block", *sizes, "growth", *(f"{s}, verified" for s in sizes), "growth"]
    body = f"{environment()}.\n\n{table(header, rows(chosen.passes))}"
    publish("growth", "How the cost grows with the model", body, write=chosen.write)


if __name__ == "__main__":
    main()
