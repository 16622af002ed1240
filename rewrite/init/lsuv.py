"""LSUV: scale each layer's weight until its output has unit variance, in one lockstep forward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rewrite.graph.editable import Editable
from rewrite.init.layers import Weight
from rewrite.runtime.layerwise import fit_in_lockstep
from rewrite.weights.assign import assign
from rewrite.weights.fans import layer_kind, linear_maps

_FITTED = ("linear", "conv", "conv_transpose", "bilinear")


def fit_unit_variance(
    captured: Editable,
    batch: Any,
    weights: dict[str, Weight],
    tolerance: float,
    iterations: int,
    notes: dict[str, list[str]],
) -> None:
    """Rescale the weights of the layers called by these names; `notes` says what happened."""
    layers = {
        name: captured.module(name)
        for name in weights
        if linear_maps(captured.module(name))
        and layer_kind(captured.module(name)) in _FITTED
        and weights[name].rule.scheme.family != "zeros"
    }

    def fit(
        name: str, layer: nn.Module, output: torch.Tensor, again: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        key = weights[name].key
        for count in range(iterations + 1):
            variance = float(output.double().var(correction=0))
            if abs(variance - 1) <= tolerance:
                notes.setdefault(name, []).append(f"variance {variance:.4g} after {count} scalings")
                return output
            if not math.isfinite(variance) or variance < 1e-30 or count == iterations:
                break
            value = getattr(layer, key).detach().double() / math.sqrt(variance)
            assign(captured.editor, layer, key, value)
            output = again()
        note = f"the output has variance {variance:.3g}; lsuv left it there"
        warnings.warn(f"{name}: {note}", stacklevel=2)
        notes.setdefault(name, []).append(note)
        return output

    for name in fit_in_lockstep(captured.model, batch, layers, fit):
        notes.setdefault(name, []).append("not fitted: the batch did not reach it")
