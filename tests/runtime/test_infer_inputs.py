"""An input is inferred for a model that comes without any, and inferring changes nothing."""

from __future__ import annotations

import pytest
from torch import nn

import models
from rewrite.runtime.infer_inputs import infer_inputs


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
    (x,) = infer_inputs(model.eval()).inputs
    assert tuple(x.shape) == shape
    model(x)


def test_nothing_is_inferred_for_a_model_of_several_inputs():
    assert infer_inputs(nn.Bilinear(2, 3, 4)).inputs is None


def test_inferring_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    infer_inputs(model, quick=True)
    assert model[1].num_batches_tracked == 0
    assert model.training


def test_reference_models_take_what_is_inferred():
    model = models.all_models()["residual"]()
    assert infer_inputs(model, quick=True).inputs is not None


def test_what_a_model_said_to_what_was_tried_is_kept():
    class Wants(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 2)

        def forward(self, x):
            raise ValueError("features come as a graph")

    found = infer_inputs(Wants())
    assert found.inputs is None and len(found.refusals) == 2
    assert found.missing == (
        "no input is known: given 2x7, the model says: features come as a graph "
        "(and refuses 1 more)"
    )
    assert infer_inputs(nn.Bilinear(2, 3, 4)).missing == "no input is known"


class Configured(nn.Module):
    """A model of text and images that says in its configuration what it takes."""

    class Config:
        model_type, vocab_size, image_size, num_channels = "own", 11, 6, 2

    config = Config()

    def __init__(self, both):
        super().__init__()
        self.both, self.embed = both, nn.Embedding(11, 4)

    def forward(self, input_ids=None, pixel_values=None):
        if self.both and pixel_values is None:
            raise ValueError("where are the pixels")
        return self.embed(input_ids)


def test_a_configuration_says_what_a_model_takes():
    assert set(infer_inputs(Configured(both=False)).inputs) == {"input_ids"}
    found = infer_inputs(Configured(both=True))
    assert {key: tuple(value.shape) for key, value in found.inputs.items()} == {
        "input_ids": (1, 8), "pixel_values": (1, 2, 6, 6),
    }  # fmt: skip
    assert found.refusals == ("given input_ids 1x8, the model says: where are the pixels",)
