"""What a student is trained for, as a sum over samples: the teacher's answers, and labels.

    L = (1 − w) Σ distance(student, teacher) + w Σ cross entropy(student, labels)

A sum, so that the mean over a global batch, whatever it is divided into, is L / n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.leaves import tensors
from rewrite.training.distillation import Distillation, relative_error
from rewrite.training.features import Pair, run_noted
from rewrite.training.held_out import check_fit
from rewrite.training.label_smoothing import LabelSmoothing, OnlineLabelSmoothing
from rewrite.training.options import RecoverOptions
from rewrite.training.samples import Samples


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
            return loss  # type: ignore[no-any-return]
        weight = self.options.label_weight
        return (1 - weight) * loss + weight * self.target(own[0], batch.labels)  # type: ignore[no-any-return]
