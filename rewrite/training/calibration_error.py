"""Expected calibration error of a classifier, and the temperature that minimizes its loss.

    ECE = Σ_b |B_b| / n · | accuracy(B_b) − confidence(B_b) |,   bins b of equal width
    T* = argmin_T −Σ_i log softmax(z_i / T)[y_i]

Guo et al. 2017 (https://arxiv.org/abs/1706.04599). The loss is convex in 1/T, so the root of its
derivative is the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rewrite.errors import OptionError
from rewrite.training.label_smoothing import check_labels

_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability plot.

    Attributes:
        error: the ECE, from 0 to 1.
        accuracy: share of right answers.
        bins: of each bin that is not empty: share of the samples, mean confidence, accuracy.
    """

    error: float
    accuracy: float
    bins: tuple[tuple[float, float, float], ...]


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Return the expected calibration error of a classifier's logits.

    Args:
        logits: (N, K), floating point.
        labels: (N,), int64 from 0 to K − 1.
        bins: how many intervals of equal width [0, 1] is divided into, at least 1.

    Raises:
        OptionError: no sample, fewer than one bin, or a label out of range.
    """
    _check(logits, labels)
    if bins < 1:
        raise OptionError(f"{bins} bins; pass 1 or more")
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    rows = []
    for number in range(bins):
        inside = place == number
        if bool(inside.any()):
            share = float(inside.double().mean())
            rows.append((share, float(confidence[inside].mean()), float(right[inside].mean())))
    error = sum(share * abs(accuracy - sure) for share, sure, accuracy in rows)
    return Reliability(error, float(right.mean()), tuple(rows))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T that minimizes the cross entropy of logits / T.

    Args:
        logits: (N, K), floating point.
        labels: (N,), int64 from 0 to K − 1.

    Returns:
        T, from 0.01 to 100.

    Raises:
        OptionError: no sample, or a label out of range.
    """
    _check(logits, labels)
    z = logits.double()
    own = z.gather(1, labels[:, None]).mean()
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(80):
        middle = (low * high) ** 0.5
        slope = ((z * middle).softmax(1) * z).sum(1).mean() - own
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(1 / (low * high) ** 0.5)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise OptionError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; pass (N, K) and (N,)"
        )
    if len(labels) == 0:
        raise OptionError("no sample to measure the calibration error on")
    check_labels(labels, logits.shape[1])
