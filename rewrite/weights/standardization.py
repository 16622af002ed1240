"""Weight standardization of a layer's weight, and back: the value of the weight does not change."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from rewrite.graph.tensor_writer import TensorWriter
from rewrite.nn.weight_standardization import WeightStandardization
from rewrite.weights.layout import Layout
from rewrite.weights.weight_norm import weight_refusal


def is_standardized(module: nn.Module, key: str = "weight") -> bool:
    """Return whether weight `key` is computed by a weight standardization, and by it alone."""
    if not parametrize.is_parametrized(module, key):
        return False
    chain = module.parametrizations[key]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    return len(chain) == 1 and isinstance(chain[0], WeightStandardization)


def standardization_refusal(module: nn.Module, layout: Layout) -> str | None:
    """Return why the weight of a layer cannot be standardized, or None."""
    if is_standardized(module):
        return "is standardized already"
    if (reason := weight_refusal(module, "weight")) is not None:
        return reason
    weight = module._parameters["weight"]
    assert weight is not None
    if layout.units(weight)[0, 0].numel() < 2:
        return "has one input a unit: nothing varies within it"
    return None


def standardize_weight(writer: TensorWriter, module: nn.Module, layout: Layout, eps: float) -> None:
    """Compute the weight of a layer from a gain, an offset and itself."""
    weight = module._parameters["weight"]
    assert weight is not None
    groups = layout.groups if layout.inputs_first else 1
    step = WeightStandardization(groups, layout.inputs_first, eps)
    writer.parametrize(module, "weight", step, weight.requires_grad)
