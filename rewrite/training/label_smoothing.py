"""Label smoothing, by one constant or by what the model itself predicts.

    smoothed    t = (1 − ε) e_y + ε / K                              (Müller et al. 2019)
    online      L = α L(e_y) + (1 − α) L(S_y),
                S_y = mean of p(x) over the samples of class y that the last epoch got right
                                                                     (Zhang et al. 2020)

with L(t) = −Σ_k t_k log p_k. In the first epoch S is uniform. A class without a right prediction in
an epoch keeps its S. (https://arxiv.org/abs/1906.02629, https://arxiv.org/abs/2011.12562)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewrite.distributed import all_reduce
from rewrite.errors import OptionError

IGNORED = -100
"""The label of a sample, or of a position, that no loss counts."""


class LabelSmoothing(nn.Module):
    """Cross entropy against smoothed labels.

    Args:
        smoothing: ε, from 0 (hard labels) to 1.
        reduction: "mean" over what is not ignored, "sum", or "none".

    Raises:
        OptionError: an argument out of its range.
    """

    def __init__(self, smoothing: float = 0.1, reduction: str = "mean") -> None:
        super().__init__()
        self.smoothing = _fraction("smoothing", smoothing)
        self.reduction = _reduction(reduction)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (N, K, *), floating, and labels (N, *), int64 from 0 to K − 1.

        Raises:
            OptionError: a label out of range, or shapes that do not fit.
        """
        _check_shapes(logits, labels)
        check_labels(labels, logits.shape[1])
        return F.cross_entropy(
            logits, labels, label_smoothing=self.smoothing, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Show ε."""
        return f"smoothing={self.smoothing}"


class OnlineLabelSmoothing(nn.Module):
    """Cross entropy against labels that follow the model's own correct predictions.

    In train mode each call adds to the statistics of the epoch; `next_epoch` turns them into the
    soft labels. Both are buffers, so that a state dict resumes them.

    Args:
        classes: K.
        alpha: weight of the hard labels; 1 − alpha is that of the soft ones.
        reduction: "mean" over what is not ignored, "sum", or "none".

    Raises:
        OptionError: an argument out of its range.
    """

    soft: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, classes: int, alpha: float = 0.5, reduction: str = "mean") -> None:
        super().__init__()
        if classes < 2:
            raise OptionError(f"online label smoothing of {classes} classes; pass 2 or more")
        self.alpha = _fraction("alpha", alpha)
        self.reduction = _reduction(reduction)
        self.register_buffer("soft", torch.full((classes, classes), 1 / classes))
        self.register_buffer("sums", torch.zeros(classes, classes, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> OnlineLabelSmoothing:
        """Keep the sums of an epoch in float64: `half()` and its kind would round them."""
        kept = self.sums, self.counts
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        if self.counts.dtype != torch.float64:
            self.sums, self.counts = (held.to(self.counts.device) for held in kept)
        return self

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (N, K, *), floating, and labels (N, *), int64 from 0 to K − 1.

        Raises:
            OptionError: a label out of range, another number of classes, or shapes that do not fit.
        """
        classes = len(self.counts)
        _check_shapes(logits, labels)
        if logits.shape[1] != classes:
            raise OptionError(f"{logits.shape[1]} logits for the {classes} classes of this loss")
        check_labels(labels, classes)
        rows = logits.movedim(1, -1).reshape(-1, classes)
        flat = labels.reshape(-1)
        known = flat != IGNORED
        if self.training:
            self._note(rows[known].detach(), flat[known])
        hard = F.cross_entropy(rows, flat, reduction="none")
        targets = self.soft[flat.masked_fill(~known, 0)].to(rows)
        soft = -(targets * F.log_softmax(rows, -1)).sum(-1) * known
        loss = self.alpha * hard + (1 - self.alpha) * soft
        if self.reduction == "none":
            return loss.reshape(labels.shape)
        return loss.sum() if self.reduction == "sum" else loss.sum() / known.sum()

    def next_epoch(self) -> tuple[int, ...]:
        """Compute the soft labels of the next epoch from this one's, over all processes.

        Returns:
            The classes without a correct prediction, which keep their soft labels.
        """
        all_reduce(self.sums)
        all_reduce(self.counts)
        met = self.counts > 0
        new = self.sums[met] / self.counts[met, None]
        self.soft[met] = new.to(self.soft)
        self.sums.zero_()
        self.counts.zero_()
        return tuple(torch.nonzero(~met).flatten().tolist())

    def _note(self, rows: Tensor, labels: Tensor) -> None:
        right = rows.argmax(-1) == labels
        self.sums.index_add_(0, labels[right], rows[right].double().softmax(-1))
        self.counts += torch.bincount(labels[right], minlength=len(self.counts))

    def extra_repr(self) -> str:
        """Show the number of classes and α."""
        return f"{len(self.counts)}, alpha={self.alpha}"


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise OptionError unless `labels` are int64 from 0 to classes − 1, or ignored."""
    if labels.dtype != torch.int64:
        raise OptionError(f"labels are {labels.dtype}; pass class numbers as torch.int64")
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        label = int(labels[wrong].flatten()[0])
        raise OptionError(f"label {label} is out of range: the model has {classes} classes")


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    """Raise OptionError unless there is one label for each row of logits (N, K, *)."""
    given, wanted = tuple(labels.shape), (*logits.shape[:1], *logits.shape[2:])
    if logits.dim() < 2 or given != wanted:
        raise OptionError(
            f"logits {tuple(logits.shape)} with labels {given}; pass (N, K, *) with (N, *)"
        )


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise OptionError(f"{name} is {value}; pass a number from 0 to 1")
    return value


def _reduction(value: str) -> str:
    if value not in ("mean", "sum", "none"):
        raise OptionError(f"reduction is {value!r}; pass mean, sum or none")
    return value
