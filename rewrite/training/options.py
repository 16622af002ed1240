"""What `recover` can be told, checked, and the rate where none is told.

    AdamW's rate of a batch of 32      η = 4e-3 · min(max((e / 0.6)³, 1), 3)

with e the relative error of the student's outputs on the held-out samples before the first step: a
step of Adam is about as long as its rate, and a student that begins further away has further to go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rewrite.errors import OptionError

Optimizer = Literal["adamw", "sgd"]
Loss = Literal["distill", "match"]
Precision = Literal["no", "fp16", "bf16"]

REFERENCE_BATCH = 32
_RATES = {"adamw": 4e-3, "sgd": 0.01}
"""Learning rates of the reference batch."""

_NEAR, _MOST = 0.6, 3.0
"""The relative error up to which AdamW takes its rate as it is, and how many times that at most."""

_BATCH = 8
"""One epoch is few steps: small batches take more of them. This, and AdamW's rates, were chosen on
parts of the training images of MNIST and of the digits that neither teacher nor student had seen.
"""


def default_rate(optimizer: Optimizer, error: float) -> float:
    """Return the learning rate of a batch of 32, for a student with that relative error."""
    if optimizer == "sgd" or not math.isfinite(error):
        return _RATES[optimizer]
    return _RATES[optimizer] * min(max((error / _NEAR) ** 3, 1.0), _MOST)


@dataclass(frozen=True)
class RecoverOptions:
    """How a student is trained.

    Attributes:
        epochs: passes over the data.
        labels: whether the data have labels, which the loss takes part of.
        optimizer: "adamw" (decoupled decay) or "sgd" (Nesterov momentum 0.9).
        loss: "distill" for classes, "match" for any output: the relative squared error.
        rate: learning rate of a batch of 32; None for `default_rate`. It is scaled linearly.
        batch_size: samples of a micro-batch.
        accumulate: micro-batches of a step.
        weight_decay: of the matrices of layers; normalized by the length of the training.
        temperature: of the soft targets.
        features: weight of the features at norms that the student has other than the teacher.
        smoothing: ε of the labels, or "online".
        label_weight: share of the labels in the loss.
        warmup: share of the steps in which the rate rises.
        recenter: whether the anchors of the norms go, so that plain norms are left.
        evaluations: how often the held-out agreement is measured.
        patience: evaluations without a better agreement after which to stop; 0 for never.
        precision: mixed precision, as accelerate names it.
        seed: of the order, and of everything else that is random.
    """

    epochs: int = 1
    labels: bool = False
    optimizer: Optimizer = "adamw"
    loss: Loss = "distill"
    rate: float | None = None
    batch_size: int = _BATCH
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
            if getattr(self, name) < 1:
                raise OptionError(f"recover: {name} is {getattr(self, name)}; pass 1 or more")
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
