"""Fold a model by observed calls, hold it to the original, and say what became of each norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from passes import FoldNorm
from tests.observe.blocks import tokens


def folded(model: nn.Module, inputs: Any = None, **options: Any) -> Any:
    """Convert, check equality to 1e-12, and return the result."""
    inputs = (tokens(),) if inputs is None else inputs
    result = rewrite.convert(model, FoldNorm(**options), example_inputs=inputs)
    with torch.no_grad():
        before, after = model(*inputs), result.model(*inputs)
    for a, b in zip(_tensors(before), _tensors(after), strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    assert result.report.ok
    return result


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in _tensors(item)]


def targets(result: Any) -> set[str]:
    """Return the names of the norms that were folded."""
    return {change.target for change in result.report.changes}


def reason(result: Any, target: str) -> str:
    """Return why a norm was left alone."""
    found = [skip.reason for skip in result.report.skips if skip.target == target]
    assert len(found) == 1, result.report.skips
    return found[0]
