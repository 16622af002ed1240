"""What a recovery found: which state is better, in words, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from rewrite.training.recovered import Held, Recovered

BEFORE, AFTER = Held(8, 0.5, 0.9, 0.4), Held(8, 0.75, 0.99, 0.1, accuracy=0.5)


def recovered(**options: Any) -> Recovered[nn.Module]:
    return Recovered(nn.Linear(2, 2), BEFORE, AFTER, ((1, 0.5, 1e-3),), ((1, AFTER),), **options)


def test_top1_comes_first_and_the_error_decides_between_equals() -> None:
    worse, better = Held(8, 0.75, 0.9, 0.2), Held(8, 0.75, 0.5, 0.1)
    assert max(BEFORE, worse, better, key=lambda held: held.score) is better
    no_classes = Held(8, None, 0.9, 0.3), Held(8, None, 0.9, 0.2)
    assert max(no_classes, key=lambda held: held.score) is no_classes[1]


def test_what_is_unknown_is_left_out_of_the_words() -> None:
    assert str(AFTER) == (
        "same top-1 on 75.0%, cosine 0.9900, relative error 0.100, accuracy 50.0%"
    )
    assert str(Held(8, None, 0.9, 0.4)) == "cosine 0.9000, relative error 0.400"


def test_json_holds_the_course_and_the_planes() -> None:
    found = recovered(stopped="interrupted", planes={"teacher": {3: torch.zeros(2, 2)}})
    data = json.loads(found.to_json())
    assert data["after"]["top1"] == 0.75 and data["stopped"] == "interrupted"
    assert data["planes"] == {"teacher": {"3": [[0.0, 0.0], [0.0, 0.0]]}}
    assert "planes" not in json.loads(recovered().to_json())
