"""Mixture-of-experts layers of transformers, run by code that supports meta, fake and float64.

The default loop over experts depends on data, and the grouped kernel supports neither meta tensors
nor float64. The implementation by batched matrix products computes the same and supports both.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def plain_experts(model: nn.Module) -> nn.Module:
    """Select batched matrix products for the experts of a model, if any; return the model."""
    choose: Any = getattr(model, "set_experts_implementation", None)
    if choose is not None and any(map(_are_experts, model.modules())):
        choose("batched_mm")
    return model


def _are_experts(module: nn.Module) -> bool:
    """Return whether a module stores its experts in one tensor, with selectable code."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")
