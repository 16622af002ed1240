"""Factors and shifts behind a norm are folded once, traced or shown by an exported call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite

X = torch.randn(2, 5, 8, dtype=torch.float64)


class Behind(nn.Module):
    """A norm, parameters to multiply with or to add, and two readers."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor], affine: bool) -> None:
        super().__init__()
        self.form = form
        self.norm = nn.LayerNorm(8, elementwise_affine=affine)
        self.rms = nn.RMSNorm(8, elementwise_affine=affine)
        self.scale, self.gain = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.shift = nn.Parameter(torch.ones(8))
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.3, 1.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda m, x: m.head(m.norm(x) * m.scale),
    "cast to the type of a value": lambda m, x: m.head(m.norm(x) * m.scale.to(x.dtype)),
    "cast to the type of a weight": lambda m, x: m.head(
        m.norm(x) * m.scale.to(m.other.weight.dtype)
    ),
    "as a value": lambda m, x: m.head(m.norm(x) * m.scale.type_as(x)),
    "on a device": lambda m, x: m.head(m.norm(x) * m.scale.to(device=x.device)),
    "scaled and shifted": lambda m, x: m.head(m.norm(x) * m.scale + m.shift),
    "shifted and scaled": lambda m, x: m.head((m.norm(x) + m.shift) * m.scale),
    "one and a scale": lambda m, x: m.head(m.norm(x) * (1 + m.scale) + m.shift),
    "scaled twice": lambda m, x: m.head(m.norm(x) * m.scale * m.gain),
    "functional": lambda m, x: m.head(F.layer_norm(x, (8,), m.scale, m.shift) * m.gain),
    "root mean square": lambda m, x: m.head(m.rms(x) * m.scale),
    "written out": lambda m, x: m.head(
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale + m.shift
    ),
    "two norms": lambda m, x: m.head(m.norm(x) * m.scale) + m.other(m.rms(x) * m.scale),
    "away from a constant": lambda m, x: m.head(m.shift - m.norm(x) * m.scale),
}  # fmt: skip


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_fold_is_exact_before_anybody_verifies_it(form: str, affine: bool) -> None:
    model = Behind(FORMS[form], affine).double().eval()
    for given in (None, X):
        result = rewrite.convert(model, "fold", example_inputs=given, verify=False)
        assert result.report.changes or form.startswith(("two", "cast", "functional", "written"))
        torch.testing.assert_close(result.model(X * 9), model(X * 9), rtol=1e-11, atol=1e-11)


def test_a_factor_that_is_cast_leaves_a_fold_or_a_skip() -> None:
    """Without inputs, a cast to the dtype of another tensor used to leave neither."""
    for form in ("cast to the type of a value", "cast to the type of a weight", "as a value"):
        model = Behind(FORMS[form], False).eval()
        report = rewrite.convert(model, "fold", verify=False).report
        targets = {outcome.target for outcome in (*report.changes, *report.skips)}
        assert "scale" in targets, form
