"""Distillation: a student learns what its teacher answers (Hinton et al. 2015).

    L = T² KL( softmax(z_t / T) ‖ softmax(z_s / T) ) + λ Σ_l ‖f_s,l − f_t,l‖² / ‖f_t,l − mean‖²

over the classes (axis 1). T² keeps the size of the gradients whatever T is. The second part matches
features, each relative to how much the teacher's vary. (https://arxiv.org/abs/1503.02531)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rewrite.errors import OptionError


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
        """Return the loss of two outputs (N, K, *), and of features (N, *) in the same order.

        Args:
            student, teacher: outputs.
            student_features, teacher_features: what else is matched.
            variances: of the teacher's features, from more samples than these, so that losses of
                parts add up to that of the whole batch; None takes those of this batch.

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
    """Return the mean of (student − teacher)² over `variance`; None is the teacher's here."""
    fixed = teacher.detach()
    known = (
        (fixed - fixed.mean()).square().mean() if variance is None else fixed.new_tensor(variance)
    )
    return (student - fixed).square().mean() / known.clamp_min(1e-12)
