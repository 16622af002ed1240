"""Distillation losses: a student is trained on the outputs of its teacher (Hinton et al. 2015).

    L = T² KL( softmax(z_t / T) ‖ softmax(z_s / T) ) + λ Σ_l ‖f_s,l − f_t,l‖² / ‖f_t,l − mean‖²

over the classes (axis 1). The factor T² makes the size of the gradients independent of T. The
second term matches features, each relative to the variance of the teacher's.
(https://arxiv.org/abs/1503.02531)

`recover` minimizes this, or another distance, together with the loss on labels:

    L = (1 − w) Σ distance(student, teacher) + w Σ cross entropy(student, labels)

with the mean over the positions of a sample (segmentation), summed over samples, so that the mean
over a global batch of n is L / n, however it is divided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.leaves import tensors
from rewrite.training.features import Pair, run_noted
from rewrite.training.held_out import check_fit
from rewrite.training.label_smoothing import LabelSmoothing, OnlineLabelSmoothing
from rewrite.training.options import RecoverOptions
from rewrite.training.samples import Samples


class Distillation(nn.Module):
    """The distance of a student's outputs, and of its features, from its teacher's.

    Args:
        temperature: T, positive.
        features: λ, the weight of the features; 0 or more.
        reduction: "mean" over the samples, or "sum".

    Raises:
        OptionError: an argument out of its range.
    """

    def __init__(
        self, temperature: float = 2.0, features: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise OptionError(f"temperature is {temperature}; pass a positive number")
        if not (features >= 0 and math.isfinite(features)):
            raise OptionError(f"features is {features}; pass a weight of 0 or more")
        if reduction not in ("mean", "sum"):
            raise OptionError(f"reduction is {reduction!r}; pass mean or sum")
        self.temperature, self.features, self.reduction = temperature, features, reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        variances: Sequence[float] | None = None,
    ) -> Tensor:
        """Return the loss, a scalar, of outputs (N, K, *) and of lists of features (N, *).

        Args:
            student: the student's logits.
            teacher: the teacher's logits, of the same shape.
            student_features: tensors of the student to be matched.
            teacher_features: the teacher's, in the same order and of the same shapes.
            variances: the variance of each of the teacher's features, from more samples than
                these, so that losses of micro-batches add up; None: that of this batch.

        Raises:
            OptionError: the shapes of student and teacher differ.
        """
        if student.shape != teacher.shape:
            raise OptionError(
                f"the student returns {tuple(student.shape)}, the teacher {tuple(teacher.shape)}"
            )
        own = F.log_softmax(student / self.temperature, 1)
        soft = F.log_softmax(teacher.detach() / self.temperature, 1)
        samples = len(student)
        positions = student[0, 0].numel()
        loss = F.kl_div(own, soft, reduction="sum", log_target=True) / positions
        loss = loss * self.temperature**2
        if self.features:
            known = [None] * len(student_features) if variances is None else variances
            parts = zip(student_features, teacher_features, known, strict=True)
            errors = sum(relative_error(s, t, variance) for s, t, variance in parts)
            loss = loss + self.features * samples * errors
        return loss / samples if self.reduction == "mean" else loss

    def extra_repr(self) -> str:
        """Show the temperature and the weight of the features."""
        return f"temperature={self.temperature}, features={self.features}"


def relative_error(student: Tensor, teacher: Tensor, variance: float | None = None) -> Tensor:
    """Return mean (student − teacher)² / `variance`; None: the variance of `teacher`."""
    fixed = teacher.detach()
    known = (
        (fixed - fixed.mean()).square().mean() if variance is None else fixed.new_tensor(variance)
    )
    return (student - fixed).square().mean() / known.clamp_min(1e-12)


class Objective:
    """The loss of a micro-batch, summed over its samples.

    Args:
        options: how to train.
        teacher: the original, in eval mode.
        outputs: what it returns for held-out samples.

    Attributes:
        classes: the number of classes of the first output, if it has classes.
    """

    def __init__(
        self, options: RecoverOptions, teacher: nn.Module, outputs: Sequence[Tensor]
    ) -> None:
        self.options, self.teacher = options, teacher
        first = outputs[0]
        classes = first.shape[1] if first.dim() >= 2 and first.shape[1] > 1 else None
        self.classes = classes
        self.variances = [float(t.double().var(correction=0)) for t in outputs]
        self.distance = Distillation(options.temperature, options.features, reduction="sum")
        self.target: LabelSmoothing | OnlineLabelSmoothing | None = None
        if classes is None and (options.loss == "distill" or options.labels):
            raise OptionError("the output has no classes (axis 1); pass loss='match', no labels")
        if options.labels and classes is not None:
            self.target = (
                OnlineLabelSmoothing(classes, reduction="sum")
                if options.smoothing == "online"
                else LabelSmoothing(float(options.smoothing), reduction="sum")
            )

    def __call__(self, student: nn.Module, batch: Samples, pairs: Sequence[Pair]) -> Tensor:
        """Return the loss of a student on a micro-batch; `pairs` are norms to match."""
        output, found = run_noted(student, batch, [pair.own for pair in pairs])
        with torch.no_grad():
            answer, wanted = run_noted(self.teacher, batch, [pair.other for pair in pairs])
        own, other = tensors(output), tensors(answer)
        check_fit(tuple(own), tuple(other))
        if not any(one.requires_grad for one in own):
            raise OptionError("no output of the student has a gradient; return its floats")
        other = [theirs.to(mine.dtype) for mine, theirs in zip(own, other, strict=True)]
        features = [
            (*pair.select(mine, theirs), pair.variance)
            for pair, calls, same in zip(pairs, found, wanted, strict=True)
            for mine, theirs in zip(calls, same, strict=True)
        ]
        if self.options.loss == "distill":
            mine, theirs, variances = zip(*features, strict=True) if features else ((), (), ())
            loss = self.distance(own[0], other[0], mine, theirs, variances)
        else:
            outputs = zip(own, other, self.variances, strict=True)
            loss = sum(relative_error(*part) for part in outputs)
            loss = loss + self.options.features * sum(relative_error(*part) for part in features)
            loss = len(batch) * loss
        if self.target is None or batch.labels is None:
            return loss  # type: ignore[no-any-return]  # sum() of tensors
        weight, positions = self.options.label_weight, batch.labels[0].numel()
        return (1 - weight) * loss + weight * self.target(own[0], batch.labels) / positions  # type: ignore[no-any-return]  # sum() of tensors
