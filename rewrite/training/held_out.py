"""Agreement of student and teacher on held-out samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.inputs import device_of, dtype_of
from rewrite.runtime.leaves import tensors
from rewrite.runtime.modes import evaluating
from rewrite.swap.agreement import Sums
from rewrite.training.calibration_error import calibration_error, fit_temperature
from rewrite.training.label_smoothing import IGNORED
from rewrite.training.penultimate import NoTemplatesError, penultimate_plane
from rewrite.training.recovered import Calibrated, Held
from rewrite.training.samples import Samples

_CHUNK = 64


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples, and the teacher's outputs for them, computed once."""

    samples: Samples
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, teacher: nn.Module, samples: Samples) -> HeldOut:
        """Run the teacher on the samples."""
        return cls(samples, outputs_of(teacher, samples))

    def measure(self, student: nn.Module) -> tuple[Held, tuple[Tensor, ...]]:
        """Return the agreement of a student with the teacher, and the student's outputs.

        Raises:
            OptionError: the student's outputs have other shapes than the teacher's.
        """
        found = outputs_of(student, self.samples)
        check_fit(found, self.outputs)
        whole = Sums()
        for old, new in zip(self.outputs, found, strict=True):
            whole.add(old, new)
        top1 = accuracy = None
        first, own = self.outputs[0], found[0]
        if first.dim() >= 2 and first.shape[1] > 1:
            top1 = float((first.argmax(1) == own.argmax(1)).double().mean())
            labels = self.samples.labels
            if labels is not None and bool((labels != IGNORED).any()):
                right = own.argmax(1) == labels.to(own.device)
                accuracy = float(right[(labels != IGNORED).to(own.device)].double().mean())
        error = whole.metrics["error"]
        return Held(len(self.samples), top1, whole.cosine, error, accuracy), found

    def calibration(
        self, outputs: Mapping[str, tuple[Tensor, ...]]
    ) -> dict[str, Calibrated] | None:
        """Return the calibration of several models by name; None without labels."""
        labels = self.samples.labels
        if labels is None or self.outputs[0].dim() != 2:
            return None
        known = labels != IGNORED
        if not bool(known.any()):
            return None
        found = {name: (one[0][known], labels[known]) for name, one in outputs.items()}
        return {
            name: Calibrated(calibration_error(*pair), fit_temperature(*pair))
            for name, pair in found.items()
        }

    def plane(self, model: nn.Module) -> dict[int, Tensor]:
        """Return the penultimate activations of the three commonest classes, in their plane.

        By class, (n, 2). Empty without labels of three classes, for models with several inputs,
        and where no linear layer computes the logits.
        """
        labels, inputs = self.samples.labels, self.samples.inputs
        if labels is None or inputs.kwargs or len(inputs.args) != 1:
            return {}
        counts = Counter(labels[labels >= 0].tolist())
        if len(counts) < 3:
            return {}
        classes = sorted(label for label, _ in counts.most_common(3))
        moved = self.samples.to(device_of(model), dtype_of(model)).inputs.args[0]
        try:
            return penultimate_plane(model, moved, labels, classes)
        except NoTemplatesError:
            return {}


def outputs_of(model: nn.Module, samples: Samples) -> tuple[Tensor, ...]:
    """Run a model in eval mode; return each tensor of its output for all samples, on the CPU.

    Raises:
        OptionError: the model rejects them, or returns no tensor whose axis 0 is the samples.
    """
    device, dtype = device_of(model), dtype_of(model)
    parts: list[list[Tensor]] = []
    with evaluating(model), torch.no_grad():
        for index in torch.arange(len(samples)).split(_CHUNK):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            chunk = samples.take(index).to(device, dtype).inputs
            try:
                output = model(*chunk.args, **chunk.kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                message = str(error).splitlines()[0]
                raise OptionError(
                    f"training data ({chunk}): the model rejects it: {message}"
                ) from error
            found = [t.detach().float().cpu() for t in tensors(output)]
            if wrong := [tuple(one.shape) for one in found if one.shape[:1] != index.shape]:
                raise OptionError(
                    f"the model returns a tensor {wrong[0]} for {len(index)} samples; axis 0 of "
                    "each output has to be the samples"
                )
            parts.append(found)
    if not parts[0]:
        raise OptionError("the model returns no tensor: nothing to compare")
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def check_fit(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
    """Raise OptionError unless two models return tensors of the same shapes."""
    own, other = [tuple(t.shape[1:]) for t in student], [tuple(t.shape[1:]) for t in teacher]
    if own != other:
        raise OptionError(f"the student returns {own} a sample, the teacher {other}: not a pair")
