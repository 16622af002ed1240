"""Experts of transformers' models, in code that meta, fake tensors and float64 take.

The loop over experts depends on data, and the grouped kernel knows neither meta nor float64;
products of batches are the spelling that everything here follows.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def plain_experts(model: nn.Module) -> nn.Module:
    """Let the experts of a model run by products of batches, if it has any; return the model."""
    choose: Any = getattr(model, "set_experts_implementation", None)
    if choose is not None and any(map(_are_experts, model.modules())):
        choose("batched_mm")
    return model


def _are_experts(module: nn.Module) -> bool:
    """Return whether a module holds experts in one tensor, whose code can be chosen."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")
