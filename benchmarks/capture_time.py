"""Time of capture: against torch.fx.symbolic_trace where that succeeds, and by the model's size.

    python -m benchmarks.capture_time

Both trace the same model in turns; the ratio is that of the fastest runs, which other work on the
machine disturbs least. The last two columns are a capture that also knows every shape, from an
example input. The second table captures chains of blocks, half of them with a forward that no
tracer follows: a cost per block that stays the same is linear growth.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import QUICK, fit_inputs, installed, make
from rewrite.graph.capture import capture
from rewrite.runtime.copying import copy_model

SIZES = (10, 100, 1000)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish both tables."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("names", nargs="*", default=QUICK, metavar="PACKAGE:ARCHITECTURE")
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = list(ratios(chosen.names, chosen.repeats))
    worst = max(row[2] / row[1] for row in rows)
    total = sum(row[2] for row in rows) / sum(row[1] for row in rows)
    body = "\n\n".join(
        (
            f"{environment('timm', 'torchvision')}. "
            f"`torch.fx.symbolic_trace` succeeds on {len(rows)} of {len(chosen.names)} "
            f"architectures. Worst ratio {worst:.2f}, all together {total:.2f} (target: 1.5).",
            table(
                [
                    "architecture",
                    "symbolic_trace, ms",
                    "capture, ms",
                    "ratio",
                    "with shapes, ms",
                    "ratio",
                ],
                [
                    [
                        n,
                        f"{t * 1e3:.1f}",
                        f"{c * 1e3:.1f}",
                        f"{c / t:.2f}",
                        f"{s * 1e3:.1f}",
                        f"{s / t:.2f}",
                    ]
                    for n, t, c, s in rows
                ],
            ),
            "Chains of blocks, every second one with control flow on values:",
            table(
                ["blocks", "regions", "capture, ms", "ms a block"],
                [
                    [n, regions, f"{s * 1e3:.1f}", f"{s * 1e3 / n:.3f}"]
                    for n, regions, s in growth(chosen.repeats)
                ],
            ),
        )
    )
    publish("capture-time", "Time of capture", body, write=chosen.write)


def ratios(names: Sequence[str], repeats: int) -> Iterator[tuple[str, float, float, float]]:
    """Yield name, seconds of symbolic_trace, of capture, and of that with shapes.

    Models that symbolic_trace cannot trace are left out.
    """
    for name in filter(installed, names):
        model = make(name)
        traced = copy_model(model)  # symbolic_trace stores constants on the model
        try:
            _quietly(partial(torch.fx.symbolic_trace, traced))
        except Exception:  # noqa: BLE001 - only models that it can trace are compared
            continue
        trace, mine, shapes = fastest(
            (
                partial(torch.fx.symbolic_trace, traced),
                partial(capture, model),
                partial(capture, model, fit_inputs(name, model)),
            ),
            repeats,
        )
        yield name, trace, mine, shapes


def growth(repeats: int, sizes: Sequence[int] = SIZES) -> Iterator[tuple[int, int, float]]:
    """Yield number of blocks, number of regions and seconds of capture."""
    for size in sizes:
        model = chain(size)
        (seconds,) = fastest((partial(capture, model),), repeats)
        yield size, len(capture(model).regions), seconds


def chain(length: int) -> nn.Sequential:
    """Return a chain of blocks, every second one untraceable."""
    return nn.Sequential(*(Block(branches=bool(i % 2)) for i in range(length))).eval()


class Block(nn.Module):
    """A convolution, a norm and an activation; with `branches`, control flow on their value."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        if self.branches and y.sum() > 1e6:
            return x
        return x + y


def fastest(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the fewest seconds that each function took, in turns, after one run to warm up."""
    best = [float("inf")] * len(functions)
    for run in range(repeats + 1):
        for index, function in enumerate(functions):
            gc.collect()
            start = clock()
            _quietly(function)
            if run:
                best[index] = min(best[index], clock() - start)
    return best


def _quietly(function: Callable[[], object]) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


if __name__ == "__main__":
    main()
