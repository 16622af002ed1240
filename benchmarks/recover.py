"""What a few unlabelled steps bring back of a swap that lost something.

    python -m benchmarks.recover [--data digits mnist mobilenet] [--write]

A trained BatchNorm network is swapped (`--num-groups 32`, InstanceNorm, LayerNorm at each position)
without data, and trained for one epoch with the original as its teacher, on the training images
and without their labels: accuracy on the test part, before and after, with the anchors kept and
annealed away (plain norms are left). `mobilenet` is MobileNetV2 with ImageNet weights on unlabelled
crops, as in `benchmarks.keep_function`: agreement with the original on crops of other photos.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import rewrite
from benchmarks._table import environment, parser, publish, table
from benchmarks.train_on import accuracy, digits, mnist

SWAPS = ("bn-to-gn{num_groups=32}", "bn-to-in", "bn-to-ln{over=c}")
SUBJECTS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "digits": digits, "mnist": mnist,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__)
    options.add_argument("--data", nargs="*", default=["digits", "mnist"])
    options.add_argument("--epochs", type=int, default=1)
    chosen = options.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = [row for name in chosen.data for row in _rows(name, chosen.epochs)]
    header = ["data", "swap", "original", "swapped", "recovered", "share", "anchors gone", "share",
              "seconds"]  # fmt: skip
    body = (
        f"{environment('accelerate')}. {chosen.epochs} epoch, no labels.\n\n{table(header, rows)}"
    )
    publish("recover", "Recovery without labels", body, write=chosen.write)


def _rows(name: str, epochs: int) -> Iterator[list[str]]:
    if name == "mobilenet":
        yield from _mobilenet(epochs)
        return
    model, data = SUBJECTS[name]()
    whole = accuracy(model, data)  # type: ignore[arg-type]
    for swap in SWAPS:
        swapped = rewrite.convert(model, [swap], example_inputs=(data[0][:2],), verify=False).model
        start = time.perf_counter()
        found = [
            accuracy(
                rewrite.recover(swapped, model, data[0], epochs=epochs, recenter=gone).model,
                data,  # type: ignore[arg-type]
            )
            for gone in (False, True)
        ]
        seconds = (time.perf_counter() - start) / 2
        before = accuracy(swapped, data)  # type: ignore[arg-type]
        cells = [f"{value:.2f} % | {value / whole:.2%}" for value in found]
        shown = [part for cell in cells for part in cell.split(" | ")]
        yield [name, f"`{swap}`", f"{whole:.2f} %", f"{before:.2f} %", *shown, f"{seconds:.0f}"]


def _mobilenet(epochs: int) -> Iterator[list[str]]:
    from benchmarks.keep_function import SUBJECTS as TRAINED

    subject = TRAINED["mobilenet"]()
    swap = "bn-to-gn{num_groups=32}"
    swapped = rewrite.convert(
        subject.model, [swap], example_inputs=(subject.example,), verify=False
    ).model
    before = subject.score(swapped)["agreement"]
    start = time.perf_counter()
    shown: list[str] = []
    for gone in (False, True):
        recovered = rewrite.recover(
            swapped, subject.model, subject.calibration, epochs=epochs, batch_size=16, recenter=gone
        )
        after = subject.score(recovered.model)["agreement"]
        shown += [f"{after:.1f} %", f"{after / 100:.1%}"]
    seconds = (time.perf_counter() - start) / 2
    yield ["mobilenet", f"`{swap}`", "100 %", f"{before:.1f} %", *shown, f"{seconds:.0f}"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
