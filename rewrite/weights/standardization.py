"""Weight standardization of a layer's weight, and back: the value of the weight does not change."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from rewrite.nn.weight_standardization import WeightStandardization
from rewrite.weights.layout import Layout
from rewrite.weights.weight_norm import own_class, weight_refusal


def is_standardized(module: nn.Module, key: str = "weight") -> bool:
    """Return whether weight `key` is computed by a weight standardization, and by it alone."""
    if not parametrize.is_parametrized(module, key):
        return False
    parametrizations = module.get_submodule("parametrizations")
    parametrizations.train(module.training)
    for parameter in parametrizations.get_submodule("weight").parameters():
        parameter.requires_grad_(weight.requires_grad)
