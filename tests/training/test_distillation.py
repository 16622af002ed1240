from __future__ import annotations

import pytest
import torch

from rewrite.errors import OptionError
from rewrite.training import Distillation


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return (p * (p.log() - q.log())).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = temperature**2 * _kl(student, teacher, temperature).mean()
    loss = Distillation(temperature)(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)
    assert abs(loss - _kl(student, teacher, temperature + 1).mean()) > 1e-3
    assert Distillation(temperature)(teacher, teacher).abs() < 1e-14


def test_maps_count_as_much_as_vectors() -> None:
    student, teacher = torch.randn(2, 5, 7, 3, 2, dtype=torch.float64)
    expected = 4 * _kl(student, teacher, 2.0).mean()
    torch.testing.assert_close(Distillation(2.0)(student, teacher), expected, rtol=0, atol=1e-13)


def test_features_are_relative_to_the_teachers_spread() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    own, other = torch.randn(2, 4, 6, dtype=torch.float64)
    loss = Distillation(features=0.5)
    expected = 0.5 * (own - other).square().sum() / (other - other.mean()).square().sum()
    torch.testing.assert_close(loss(logits, logits, [own], [other]), expected)
    torch.testing.assert_close(loss(logits, logits, [own], [other]) * 4,
                               Distillation(features=0.5, reduction="sum")(logits, logits, [own],
                                                                           [other]))  # fmt: skip
    with pytest.raises(ValueError, match="shorter"):
        loss(logits, logits, [own], [])


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 5, 7).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    Distillation(features=1.0)(student, teacher, [student], [teacher]).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().max() > 0


def test_bad_arguments() -> None:
    for options in ({"temperature": 0.0}, {"features": -1.0}, {"reduction": "none"}):
        with pytest.raises(OptionError, match=f"^{next(iter(options))} is "):
            Distillation(**options)
    with pytest.raises(OptionError, match=r"the student returns \(2, 3\), the teacher \(2, 4\)"):
        Distillation()(torch.zeros(2, 3), torch.zeros(2, 4))
