"""The options of `recover`, validated, and the default learning rate and batch size.

    AdamW, batch size 32      η = 4e-3 · min(max((e / 0.6)³, 1), 3)
    batch size                n = N / 400 of N samples, from 2 to 8
    AdamW, batch size n       η_n = η max(n, 8) / 32

with e the relative error of the student's outputs on the held-out samples before the first step: a
step of Adam changes each weight by about η, and a student that starts further away has further to
go. An epoch of few samples is few steps, so it takes smaller batches, and their steps stay as long
as those of a batch of 8: halving the rate with the batch goes no further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rewrite.errors import OptionError
from rewrite.training.schedule import linear_scaling

Optimizer = Literal["adamw", "sgd"]
Loss = Literal["distill", "match"]
Precision = Literal["no", "fp16", "bf16"]

REFERENCE_BATCH = 32
_RATES = {"adamw": 4e-3, "sgd": 0.01}
"""Learning rates of the reference batch."""

_NEAR, _MOST = 0.6, 3.0
"""The relative error up to which AdamW takes its rate as it is, and how many times that at most."""

_LARGEST_SEED = 2**32 - 1

_FEWEST, _MOST_SAMPLES, _STEPS = 2, 8, 400
"""Samples of a batch at least and at most, and the steps that an epoch should have. These, and
AdamW's rates, were chosen on parts of the training images of MNIST and of the digits that neither
teacher nor student had seen. InstanceNorm, 1,150 images, share of the teacher's accuracy on 2,000
others, four runs: batch 8 98.2 %; 4 98.7, 2 98.8; 2 with a quarter of the rate 97.7.
"""


def default_rate(optimizer: Optimizer, error: float) -> float:
    """Return the default rate for batches of 32, given a student's initial relative error."""
    if optimizer == "sgd" or not math.isfinite(error):
        return _RATES[optimizer]
    return _RATES[optimizer] * min(max(min(error / _NEAR, _MOST) ** 3, 1.0), _MOST)


def default_batch(samples: int, parts: int) -> int:
    """Return the default size of a micro-batch: an epoch has 400 steps, if 2 to 8 samples allow.

    Args:
        samples: how many an epoch has.
        parts: micro-batches of a step, over all workers.
    """
    return min(max(samples // (_STEPS * parts), _FEWEST), _MOST_SAMPLES)


def rate_of(optimizer: Optimizer, rate: float, batch: int) -> float:
    """Return the learning rate of a global batch size, given that of a batch of 32.

    It grows linearly with the batch; AdamW's is not less than that of 8 samples.
    """
    if optimizer == "adamw":
        batch = max(batch, _MOST_SAMPLES)
    return linear_scaling(rate, batch, REFERENCE_BATCH)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class RecoverOptions:
    """How a student is trained.

    Attributes:
        epochs: passes over the data, at least 1.
        labels: whether the data have labels, for a second term of the loss.
        optimizer: "adamw" (decoupled decay) or "sgd" (Nesterov momentum 0.9).
        loss: "distill" for logits, or "match", the relative squared error, for any output.
        rate: learning rate for a batch of 32; `rate_of` has that of others. None: `default_rate`.
        batch_size: samples per micro-batch; None: `default_batch`.
        accumulate: micro-batches per step.
        weight_decay: normalized decay λ_n of weight matrices (`normalized_decay`), 0 or more.
        temperature: T of the soft targets, positive.
        features: weight λ of the features at replaced norms, 0 or more.
        smoothing: ε of label smoothing, or "online".
        label_weight: weight of the labels in the loss, from 0 to 1.
        warmup: fraction of the steps in which the rate rises.
        recenter: whether to anneal the anchors of the norms away, so that plain norms remain.
        evaluations: how many times the held-out agreement is measured.
        patience: stop after so many evaluations without improvement; 0 never stops.
        precision: mixed precision, as accelerate names it.
        seed: seed of the order of samples, and of all other randomness.
    """

    epochs: int = 1
    labels: bool = False
    optimizer: Optimizer = "adamw"
    loss: Loss = "distill"
    rate: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    weight_decay: float = 0.05
    temperature: float = 2.0
    features: float = 0.0
    smoothing: float | Literal["online"] = 0.1
    label_weight: float = 0.5
    warmup: float = 0.1
    recenter: bool = False
    evaluations: int = 10
    patience: int = 0
    precision: Precision = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluations"):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if not _is_whole(value) or value < 1:
                raise OptionError(f"recover: {name} is {value}; pass a whole number, 1 or more")
        if not _is_whole(self.seed) or abs(self.seed) > _LARGEST_SEED:
            raise OptionError(
                f"recover: seed is {self.seed}; pass a whole number up to {_LARGEST_SEED}"
            )
        choices = {"optimizer": Optimizer, "loss": Loss, "precision": Precision}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                wanted = ", ".join(get_args(kind))
                raise OptionError(
                    f"recover: {name} is {getattr(self, name)!r}; pass one of {wanted}"
                )
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise OptionError(f"recover: rate is {self.rate}; pass a positive number")
        for name in ("warmup", "label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"recover: {name} is {getattr(self, name)}; pass a share, 0 to 1")
        for name in ("weight_decay", "features", "patience"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"recover: {name} is {getattr(self, name)}; pass 0 or more")
        if isinstance(self.smoothing, str) and self.smoothing != "online":
            raise OptionError(f"recover: smoothing is {self.smoothing!r}; pass a number or online")
