"""Learning rates for large minibatches (Goyal et al. 2017).

    linear scaling       η = η_ref n / n_ref
    gradual warmup       η_t = η (s + (1 − s) t / T),  t < T;   s = n_ref / n begins at η_ref
    momentum correction  v ← (η_new / η_old) v

The last is for optimizers that keep v = m v + η g, with the rate inside. `torch.optim.SGD` keeps
u = m u + g and steps by η u, for which a change of the rate needs no correction (§3 there, remark
2). (https://arxiv.org/abs/1706.02677)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rewrite.errors import OptionError


def linear_scaling(rate: float, batch_size: int, reference: int = 256) -> float:
    """Return the learning rate of a global batch size, from that of the reference batch.

    Args:
        rate: the rate that suits `reference`.
        batch_size: samples a step, over all workers and accumulated batches.
        reference: the batch size that `rate` was found with.

    Raises:
        OptionError: a batch size below 1, a rate that is not finite.
    """
    if not (batch_size >= 1 and reference >= 1 and math.isfinite(rate)):
        raise OptionError(
            f"rate {rate}, batch size {batch_size}, reference {reference}: pass a finite rate and "
            "sizes of 1 or more"
        )
    return rate * batch_size / reference


def warmup(step: int, steps: int, start: float = 0.0) -> float:
    """Return the factor of the learning rate at `step` (from 0): linear from `start`, then 1.

    `torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: warmup(t, 500, start=1 / 8))` warms up
    over 500 steps, from the rate of a batch of an eighth of the size.

    Raises:
        OptionError: a negative number, or NaN.
    """
    if not (step >= 0 and steps >= 0 and start >= 0):
        raise OptionError(f"warmup at step {step} of {steps} from {start}: pass 0 or more")
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def correct_momentum(velocities: Iterable[Tensor], old_rate: float, new_rate: float) -> None:
    """Rescale velocities v = m v + η g, in place, for a rate that changes.

    Each is multiplied by `new_rate` / `old_rate`, both learning rates η.

    Raises:
        OptionError: the old rate is not positive, or the new one is negative.
    """
    if not (old_rate > 0 and new_rate >= 0):
        raise OptionError(
            f"momentum correction from rate {old_rate} to {new_rate}; the old one has to be "
            "positive, and none negative"
        )
    with torch.no_grad():
        for velocity in velocities:
            velocity.mul_(new_rate / old_rate)
