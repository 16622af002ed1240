from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rewrite.equivalence.compare import compare
from rewrite.runtime.leaves import leaves

Pair = namedtuple("Pair", "first second")


@dataclass
class Boxes:
    boxes: torch.Tensor
    labels: torch.Tensor


class Plain:
    def __init__(self) -> None:
        self.value = torch.ones(2)


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (torch.ones(1), ["output"]),
        ({"a": [torch.ones(1), 2]}, ["output['a'][0]", "output['a'][1]"]),
        (Pair(torch.ones(1), None), ["output.first", "output.second"]),
        (Boxes(torch.ones(1), torch.ones(1)), ["output.boxes", "output.labels"]),
        (Plain(), ["output.value"]),
        ([{"x": (np.ones(1),)}], ["output[0]['x'][0]"]),
    ],
)
def test_leaves_reaches_into_any_structure(value, paths):
    assert [path for path, _ in leaves(value)] == paths


def test_distances_are_relative_to_the_tensor_and_not_to_each_element():
    a = torch.tensor([100.0, 1e-9], dtype=torch.float64)
    b = torch.tensor([101.0, 2e-9], dtype=torch.float64)
    found = compare(a, b)
    assert found.max_abs == 1.0
    assert found.max_rel == pytest.approx(0.01)
    assert not found.reasons


def test_detection_lists_of_varying_length():
    a = [{"boxes": torch.ones(3, 4), "labels": torch.ones(3)}]
    b = [{"boxes": torch.ones(2, 4), "labels": torch.ones(2)}]
    assert compare(a, a).reasons == ()
    assert "shape (3, 4) became (2, 4)" in compare(a, b).reasons[0]


def test_missing_and_new_values_are_named():
    found = compare({"a": torch.ones(1), "b": 1}, {"a": torch.ones(1), "c": 1})
    assert any("output['b']" in reason for reason in found.structure)
    assert any("output['c']" in reason for reason in found.structure)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        ("cat", "dog"),
        (3, 4),
        (None, 1),
        (torch.tensor([1.0, float("nan")]), torch.tensor([float("nan"), 1.0])),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")])),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    ],
)
def test_values_without_a_distance_have_to_be_equal(a, b):
    assert compare(a, b).reasons
    assert not compare(a, a).reasons
    assert not compare(b, b).reasons


def test_nan_in_the_same_places_is_left_out_of_the_distance():
    a = torch.tensor([float("nan"), 1.0])
    found = compare(a, torch.tensor([float("nan"), 1.5]))
    assert not found.reasons
    assert found.max_abs == 0.5
    assert not found.finite


def test_agreement_counts_equal_top_classes_and_forgives_ties():
    a = torch.tensor([[1.0, 2.0], [3.0, 3.0], [5.0, 0.0]])
    b = torch.tensor([[0.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    assert compare(a, b).agreement == pytest.approx(2 / 3)


def test_a_row_with_nan_has_no_top_class() -> None:
    nan = float("nan")
    a = torch.tensor([[1.0, 2.0], [nan, nan], [nan, 3.0]])
    found = compare(a, torch.tensor([[0.0, 9.0], [1.0, 0.0], [0.0, 1.0]]))
    assert (found.agreement, found.predictions, found.nothing) == (1.0, 1, False)
    alone = compare(a[1:2], a[1:2])
    assert (alone.agreement, alone.cosine, alone.predictions) == (None, None, 0)
    assert alone.nothing and not alone.reasons


def test_an_infinity_is_a_value_that_can_be_compared() -> None:
    masked = torch.tensor([[-float("inf"), -float("inf")]])
    assert not compare(masked, masked).nothing


def test_agreement_of_images_is_along_the_channels():
    a = torch.zeros(1, 2, 1, 2)
    a[0, 1] = 1
    b = a.clone()
    b[0, 0, 0, 0] = 2
    assert compare(a, b).agreement == pytest.approx(0.5)


def test_cosine_of_opposite_vectors():
    a = torch.tensor([[1.0, 2.0]])
    assert compare(a, a).cosine == pytest.approx(1)
    assert compare(a, -a).cosine == pytest.approx(-1)


def test_zero_against_something_is_infinitely_far():
    assert compare(torch.zeros(2), torch.ones(2)).max_rel == float("inf")


def test_the_number_of_detections_is_a_value_and_other_shapes_are_structure() -> None:
    before = [{"boxes": torch.rand(5, 4), "scores": torch.rand(5)}]
    after = [{"boxes": torch.rand(2, 4), "scores": torch.rand(2)}]
    found = compare(before, after)
    assert not found.structure and len(found.reasons) == 2
    assert compare([torch.rand(5, 4)], [torch.rand(5, 3)]).structure
    assert compare(torch.rand(5, 4), torch.rand(2, 4)).structure
