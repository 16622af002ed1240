"""Modules of streams that have been centred."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rewrite
from rewrite.nn import Centre, ShiftedRMSNorm
from tests.streams.blocks import PreNorm, X, centred, draw, error


def test_centre_puts_a_module_behind_a_norm_that_writes() -> None:
    model = draw(PreNorm(embedding_norm=True))
    (skip,) = centred(model).report.skips
    assert "written by layer_norm in first" in skip.reason and "centre=True" in skip.reason
    result = centred(model, centre=True)
    assert isinstance(result.model.first[1], Centre)  # type: ignore[index]
    assert error(model, result.model, X) < 1e-13
    (change,) = result.report.changes
    assert change.keys["first.weight"] == "first.0.weight"


def test_a_file_of_it_opens(tmp_path: Any) -> None:
    result = centred(draw(PreNorm(embedding_norm=True)), centre=True)
    assert any(isinstance(m, ShiftedRMSNorm) for m in result.model.modules())
    norm = next(m for m in result.model.modules() if isinstance(m, ShiftedRMSNorm))
    rewrite.save(nn.Sequential(norm, Centre()), tmp_path / "norm.pt")
    opened = rewrite.load(tmp_path / "norm.pt")
    assert torch.equal(opened(X), norm(X) - norm(X).mean(-1, keepdim=True))
