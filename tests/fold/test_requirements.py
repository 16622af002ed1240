"""rewrite.fold.requirements: what a plan relies on, and what of a map breaks it."""

from __future__ import annotations

import pytest
import torch

from rewrite.affine.algebra import Affine
from rewrite.fold.requirements import SMALLEST_SCALE, Requirements, uninvertible


def affine(scale: list[float], shift: list[float]) -> Affine:
    return Affine(torch.tensor(scale).double(), torch.tensor(shift).double())


@pytest.mark.parametrize(
    ("requirements", "broken", "kept", "reason"),
    [
        (Requirements(), ([1, float("nan")], [0, 0]), ([2, -3], [1, 1]), "not finite"),
        (Requirements(), ([1, 1], [float("inf"), 0]), ([0, 0], [1, 1]), "not finite"),
        (Requirements(adds=False), ([2, 2], [0, 1]), ([2, 2], [0, 0]), "moves no shift"),
        (Requirements(scales=False), ([1, 2], [1, 1]), ([1, 1], [1, 1]), "moves no scale"),
        (Requirements(positive=True), ([1, -1], [0, 0]), ([1, 0.1], [0, 0]), "not positive"),
        (Requirements(positive=True), ([1, 0], [0, 0]), ([1, 0.1], [0, 0]), "not positive"),
        (Requirements(invertible=True), ([1, 0], [0, 0]), ([1, -2], [0, 0]), "scale of zero"),
        (
            Requirements(invertible=True), ([1, SMALLEST_SCALE / 2], [0, 0]),
            ([1, SMALLEST_SCALE], [0, 0]), "nearly zero",
        ),
    ],
)  # fmt: skip
def test_what_breaks_a_plan_is_said_and_what_does_not_is_not(
    requirements: Requirements,
    broken: tuple[list[float], list[float]],
    kept: tuple[list[float], list[float]],
    reason: str,
) -> None:
    assert reason in requirements.broken_by(affine(*broken))
    assert requirements.broken_by(affine(*kept)) == ""


def test_an_inverse_needs_a_type_that_keeps_24_bits() -> None:
    good = affine([1, 2], [0, 0])
    assert uninvertible(good, torch.float32) == ""
    assert "torch.bfloat16" in uninvertible(good, torch.bfloat16)
