"""What a student is trained for, as a sum over samples: the teacher's answers, and labels.

    L = (1 − w) Σ distance(student, teacher) + w Σ cross entropy(student, labels)

A sum, so that the mean over a global batch, whatever it is divided into, is L / n.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.leaves import tensors
from rewrite.runtime.tree import Tree
from rewrite.training.distillation import Distillation, relative_error
from rewrite.training.held_out import check_fit
from rewrite.training.label_smoothing import LabelSmoothing, OnlineLabelSmoothing
from rewrite.training.options import RecoverOptions
from rewrite.training.samples import Samples


class Objective:
    """The loss of a micro-batch, summed over its samples.

    Args:
        options: how to train.
        teacher: the original, in eval mode.
        classes: the number of classes of its output, if it has classes.
    """

    def __init__(self, options: RecoverOptions, teacher: nn.Module, classes: int | None) -> None:
        self.options, self.teacher = options, teacher
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
        own, found = _run(student, batch, [pair[0] for pair in pairs])
        with torch.no_grad():
            other, wanted = _run(self.teacher, batch, [pair[1] for pair in pairs])
        check_fit(tuple(own), tuple(other))
        if self.options.loss == "distill":
            loss = self.distance(own[0], other[0], found, wanted)
        else:
            parts = zip([*own, *found], [*other, *wanted], strict=True)
            loss = len(batch) * sum(relative_error(s, t) for s, t in parts)
        if self.target is None or batch.labels is None:
            return loss  # type: ignore[no-any-return]
        weight = self.options.label_weight
        return (1 - weight) * loss + weight * self.target(own[0], batch.labels)  # type: ignore[no-any-return]


Pair = tuple[nn.Module, nn.Module]
"""A norm of the student, and what stands there in the teacher."""


def swapped_norms(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Return the modules of one name where the teacher has a BatchNorm and the student has none."""
    own, kind = Tree(student), nn.modules.batchnorm._BatchNorm
    return [
        (own.names[name], module)
        for name, module in Tree(teacher).modules()
        if isinstance(module, kind) and not isinstance(own.names.get(name, module), kind)
    ]


def _run(
    model: nn.Module, batch: Samples, watched: Sequence[nn.Module]
) -> tuple[list[Tensor], list[Tensor]]:
    with _outputs(watched) as noted:
        output = model(*batch.inputs.args, **batch.inputs.kwargs)
    return tensors(output), noted


@contextlib.contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of `modules`, as they are before anything writes into them."""
    noted: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        noted.append(output.clone())

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
