"""An input is inferred for a model that comes without any, and inferring changes nothing."""

from __future__ import annotations

import pytest
from torch import nn

import models
from rewrite.runtime.infer_inputs import infer_example_inputs


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(5, 2, 3)), (1, 5, 224, 224)),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)),
            (1, 1, 28, 28),
        ),
        (nn.Linear(7, 2), (2, 7)),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2)), (1, 16)),
        (nn.Conv1d(3, 4, 5), (1, 3, 256)),
        (nn.BatchNorm1d(6), (2, 6)),
    ],
)
def test_inputs_are_inferred_from_the_first_layer(model, shape):
    (x,) = infer_example_inputs(model.eval())
    assert tuple(x.shape) == shape
    model(x)


def test_nothing_is_inferred_for_a_model_of_several_inputs():
    assert infer_example_inputs(nn.Bilinear(2, 3, 4)) is None


def test_inferring_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    infer_example_inputs(model, quick=True)
    assert model[1].num_batches_tracked == 0
    assert model.training


def test_reference_models_take_what_is_inferred():
    model = models.all_models()["residual"]()
    assert infer_example_inputs(model, quick=True) is not None
