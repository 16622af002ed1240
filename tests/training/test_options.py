"""What `recover` can be told, checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.training import RecoverOptions, recover
from rewrite.training.options import default_batch, default_rate, rate_of
from tests.training.test_recover import _data, _student, _teacher


@pytest.mark.parametrize(
    ("student", "data", "settings", "message"),
    [
        (nn.Linear(6, 5), _data(), {}, "the student returns .* the teacher .* not a pair"),
        (nn.Linear(7, 4), _data(), {}, "the model rejects it"),
        (_student(), [torch.zeros(1, 6)], {}, "1 sample; one is held out"),
        (_student(), [], {}, "0 sample"),
        (_student(), [torch.full((4, 6), float("nan"))], {}, "NaN or infinity"),
        (_student(), _data(), {"labels": True}, "has no labels"),
        (_student(), [(torch.zeros(4, 6), torch.tensor([0, 1, 2, 9]))], {"labels": True},
         "label 9 is out of range: the model has 4 classes"),
        (_student(), [(torch.zeros(4, 6), torch.zeros(3).long())], {"labels": True},
         "4 samples, 3 labels"),
        (_student(), _data(), {"epochs": 0}, "epochs is 0"),
        (_student(), _data(), {"optimizer": "adam"}, "pass one of adamw, sgd"),
        (_student(), _data(), {"epoch": 1}, "unexpected keyword argument 'epoch'"),
        (_student(), _data(), {"features": 1.0}, "no norm in the place of a BatchNorm"),
        (_student().requires_grad_(False), _data(), {}, "no trainable parameter"),
    ],
)  # fmt: skip
def test_bad_input(
    student: nn.Module, data: list[object], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        recover(student, _teacher(), data, **settings)
    assert "\n" not in str(raised.value)


def test_options_and_their_fields() -> None:
    with pytest.raises(OptionError, match="not both"):
        recover(_student(), _teacher(), _data(), options=RecoverOptions(), epochs=2)


def test_a_student_that_begins_further_away_takes_longer_steps() -> None:
    rates = [default_rate("adamw", error) for error in (0, 0.5, 0.75, 0.9, 30.0, float("nan"))]
    assert rates == pytest.approx([4e-3, 4e-3, 7.8125e-3, 12e-3, 12e-3, 4e-3])
    assert default_rate("sgd", 0.1) == default_rate("sgd", 0.9) == 0.01


def test_the_rate_of_a_training_is_by_where_it_begins() -> None:
    def highest(student: nn.Module, **settings: object) -> float:
        recovered = recover(student, _teacher(), _data(), batch_size=32, warmup=0, **settings)
        return max(rate for _, _, rate in recovered.steps)

    assert highest(_teacher()) == pytest.approx(4e-3)
    assert highest(_student()) == pytest.approx(12e-3)
    assert highest(_student(), rate=1e-3) == pytest.approx(1e-3)
    assert highest(_student(), optimizer="sgd") == pytest.approx(0.01)


def test_an_epoch_of_few_samples_takes_smaller_batches_with_steps_as_long() -> None:
    sizes = [default_batch(samples, 1) for samples in (1, 799, 1200, 3200, 100_000)]
    assert sizes == [2, 2, 3, 8, 8] and default_batch(3200, 4) == 2
    rates = [rate_of("adamw", 4e-3, batch) for batch in (2, 4, 8, 16, 256)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 2e-3, 32e-3])
    assert rate_of("sgd", 0.01, 2) == pytest.approx(0.01 / 16)  # linear all the way


def test_the_default_batch_is_that_of_the_samples() -> None:
    few, given = (
        recover(_student(), _teacher(), _data(), **settings) for settings in ({}, {"batch_size": 8})
    )
    assert len(few.steps) == 4 * len(given.steps) == 32
