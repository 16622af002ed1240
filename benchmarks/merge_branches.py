"""Parallel branches merged, beside timm's hand-written `reparameterize_model`.

    python -m benchmarks.merge_branches            one row an architecture
    python -m benchmarks.merge_branches --write    and put them into docs/benchmarks.md

`layers` counts the convolutions, linear layers and batch norms that a forward runs. Errors are the
largest difference of the output in float64, with random statistics, relative to the largest value.
timm's function runs on a deep copy, ours is `passes.FoldNorm`, which knows none of these classes.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._table import environment, parser, publish, table
from benchmarks.folders import ours, timm_reparameterize
from benchmarks.scoreboard import difference

MODELS = {
    "repvgg_a0": 64, "mobileone_s0": 64, "repghostnet_050": 64, "fastvit_t8": 64,
    "levit_128s": 224,
}  # fmt: skip


class _CountLayers(TorchDispatchMode):
    """Count the convolutions, matrix products of linear layers, and batch norms that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("convolution", "addmm", "mm", "linear") or "batch_norm" in name
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Return the output and how many layers ran."""
    with torch.no_grad(), _CountLayers() as layers:
        output = model(x)
    return [output], layers.count


def measure(name: str, size: int) -> list[object]:
    """Return one row: layers and errors, before, by timm and by us."""
    import timm

    import models

    torch.manual_seed(0)
    model = models.randomize_norms_(timm.create_model(name)).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    want, before = run(model, x)
    # Some of timm's merged convolutions are float32 whatever the model is.
    merged = timm_reparameterize(copy.deepcopy(model), (x,)).double()
    theirs, their_layers = run(merged, x)
    mine, my_layers = run(ours(model, (x,)), x)
    return [
        name, before, their_layers, my_layers,
        f"{difference(theirs, want):.1e}", f"{difference(mine, want):.1e}",
    ]  # fmt: skip


def main() -> None:
    """Print the table, and write it when asked to."""
    options = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(name, size) for name, size in MODELS.items()]
    header = ["architecture", "layers", "timm's", "ours", "timm's error", "our error"]
    text = f"{environment('timm')}\n\n{table(header, rows)}"
    publish("merge-branches", "Parallel branches beside timm", text, write=options.write)


if __name__ == "__main__":
    main()
