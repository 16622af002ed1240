"""What cannot be converted, and what cannot be run, is one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite

X = torch.randn(2, 3)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, "a NoneType"), ("resnet18", "a str"), (nn.Linear, "Linear"), ({}, "a dict"),
        (lambda x: x, "a function"), (model().state_dict(), "a OrderedDict"),
    ],
)  # fmt: skip
def test_what_is_no_module_is_refused_by_its_kind(given: Any, kind: str) -> None:
    with pytest.raises(rewrite.CaptureError, match=f"^{kind} is no torch.nn.Module"):
        rewrite.convert(given, "fold", example_inputs=X)


def test_an_input_without_values_is_no_input_to_verify_on() -> None:
    absent = torch.empty(2, 3, device="meta")
    with pytest.raises(rewrite.VerificationError, match="has no values"):
        rewrite.convert(model(), "fold", example_inputs=absent)
    shapes_only = rewrite.convert(model(), "fold", example_inputs=absent, verify=False)
    assert len(shapes_only.report.changes) == 1


def test_calls_are_a_list_of_calls() -> None:
    with pytest.raises(rewrite.OptionError, match="example_calls is a Tensor: give a list"):
        rewrite.convert(model(), "fold", example_calls=X)  # type: ignore[arg-type]
    assert rewrite.convert(model(), "fold", example_calls=[X]).report.changes
