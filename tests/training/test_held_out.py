"""Held-out samples: what the teacher said of them is noted once, and students are held to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.runtime.inputs import Inputs
from rewrite.training.held_out import HeldOut, check_fit, outputs_of
from rewrite.training.samples import Samples


class Teacher(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def samples(labels: torch.Tensor | None = None) -> Samples:
    torch.manual_seed(0)
    return Samples(Inputs.of((torch.randn(12, 4),)), labels)


def test_a_student_that_is_the_teacher_agrees_and_another_does_not() -> None:
    teacher = Teacher(4, 3)
    held = HeldOut.of(teacher, samples())
    asked = teacher.calls
    same, _ = held.measure(teacher)
    assert (same.samples, same.top1, same.accuracy) == (12, 1.0, None) and same.error < 1e-6
    other = nn.Linear(4, 3)
    other.weight.data, other.bias.data = -teacher.weight.data, -teacher.bias.data
    opposite, _ = held.measure(other)
    assert opposite.cosine == pytest.approx(-1) and opposite.error > 1
    assert teacher.calls == asked + 1  # only as the student; its own answers were noted


def test_with_labels_right_answers_are_counted() -> None:
    teacher = Teacher(4, 3)
    answers = teacher(samples().inputs.args[0]).argmax(1)
    held = HeldOut.of(teacher, samples(answers))
    assert held.measure(teacher)[0].accuracy == 1.0
    wrong = HeldOut.of(teacher, samples((answers + 1) % 3))
    assert wrong.measure(teacher)[0].accuracy == 0.0
    assert held.calibration({"teacher": held.outputs}) is not None
    assert HeldOut.of(teacher, samples()).calibration({"teacher": held.outputs}) is None


def test_a_student_of_another_shape_is_no_student() -> None:
    held = HeldOut.of(Teacher(4, 3), samples())
    with pytest.raises(OptionError, match=r"returns \[\(2,\)\] a sample, the teacher \[\(3,\)\]"):
        held.measure(nn.Linear(4, 2))
    check_fit((torch.zeros(1, 3),), (torch.zeros(9, 3),))


def test_data_that_the_model_rejects_is_said_in_one_line() -> None:
    with pytest.raises(OptionError, match="the model rejects it: mat1 and mat2 shapes"):
        outputs_of(nn.Linear(5, 2), samples())
