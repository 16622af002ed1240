"""What a few unlabelled steps bring back of a swap that lost something.

    python -m benchmarks.recover [--data digits mnist mobilenet] [--seeds 3] [--write]

A trained BatchNorm network is swapped (`--num-groups 32`, InstanceNorm, LayerNorm at each position)
without data, and trained for one epoch with the original as its teacher, on the training images
and without their labels: accuracy on the test part, before and after, with the anchors kept and
annealed away (plain norms are left); mean and deviation over the seeds of the order. The outputs
of the swapped norms are matched too (`--features`); all else are the defaults of `rewrite.recover`.
Both were chosen on a part of MNIST's training images, with a teacher that had not seen it.
`mobilenet` is MobileNetV2 with ImageNet weights on unlabelled crops, as in
`benchmarks.keep_function`: agreement with the original on crops of other photos.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from benchmarks._table import environment, parser, publish, table
from benchmarks.train_on import accuracy, digits, mnist

SWAPS = ("bn-to-gn{num_groups=32}", "bn-to-in", "bn-to-ln{over=c}")
Train = Callable[[bool, int], nn.Module]
Score = Callable[[nn.Module], float]

_AIM = 0.995

SUBJECTS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "digits": digits, "mnist": mnist,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__)
    options.add_argument("--data", nargs="*", default=["digits", "mnist"])
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--features", type=float, default=0.1, help="weight of the features")
    chosen = options.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seeds = range(chosen.seeds)
    settings = {"epochs": chosen.epochs, "features": chosen.features}
    found = [row for name in chosen.data for row in _rows(name, settings, seeds)]
    header = ["data", "swap", "original", "swapped", "recovered", "share", "anchors gone", "share",
              "seconds"]  # fmt: skip
    shares = [share for _, entry in found for share in entry]
    met = sum(share >= _AIM for share in shares)
    body = (
        f"{environment('accelerate')}. {chosen.epochs} epoch, no labels, {chosen.seeds} seeds, "
        f"features {chosen.features:g}.\n\n"
        f"{table(header, [row for row, _ in found])}\n\n"
        f"The aim, {_AIM:.1%} of the original's, is met by the mean of {met} of {len(shares)}."
    )
    publish("recover", "Recovery without labels", body, write=chosen.write)


Row = tuple[list[str], list[float]]
"""The cells of a row, and the shares in it."""


def _rows(name: str, settings: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[Row]:
    if name == "mobilenet":
        yield _mobilenet(settings, seeds)
        return
    model, data = SUBJECTS[name]()
    whole = accuracy(model, data)  # type: ignore[arg-type]
    for swap in SWAPS:
        swapped = rewrite.convert(model, [swap], example_inputs=(data[0][:2],), verify=False).model

        def score(student: nn.Module) -> float:
            return accuracy(student, data)  # type: ignore[arg-type]

        def train(gone: bool, seed: int, start: nn.Module = swapped) -> nn.Module:
            return rewrite.recover(
                start, model, data[0], recenter=gone, seed=seed, **settings
            ).model

        yield _row([name, f"`{swap}`"], whole, score(swapped), (train, score), seeds)


def _mobilenet(settings: Mapping[str, Any], seeds: Sequence[int]) -> Row:
    from benchmarks.keep_function import SUBJECTS as TRAINED

    subject = TRAINED["mobilenet"]()
    swap = "bn-to-gn{num_groups=32}"
    swapped = rewrite.convert(
        subject.model, [swap], example_inputs=(subject.example,), verify=False
    ).model

    def score(student: nn.Module) -> float:
        return float(subject.score(student)["agreement"])

    def train(gone: bool, seed: int) -> nn.Module:
        return rewrite.recover(
            swapped, subject.model, subject.calibration, recenter=gone, seed=seed, **settings
        ).model

    return _row(["mobilenet", f"`{swap}`"], 100.0, score(swapped), (train, score), seeds)


def _row(
    names: list[str], whole: float, before: float, run: tuple[Train, Score], seeds: Sequence[int]
) -> Row:
    """Train once for each seed, with the anchors kept and gone."""
    train, score = run
    start = time.perf_counter()
    cells, shares = [], []
    for gone in (False, True):
        found = torch.tensor([score(train(gone, seed)) for seed in seeds], dtype=torch.double)
        spread = f" ± {float(found.std()):.2f}" if len(seeds) > 1 else ""
        share = float(found.mean()) / whole
        cells += [f"{float(found.mean()):.2f}{spread} %", f"{share:.2%}"]
        shares.append(share)
        print(names, gone, found.tolist(), flush=True)
    seconds = (time.perf_counter() - start) / (2 * len(seeds))
    return [*names, f"{whole:.2f} %", f"{before:.2f} %", *cells, f"{seconds:.0f}"], shares


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
