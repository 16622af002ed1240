"""What an observed call of a small model shows of its streams."""

from __future__ import annotations

from torch import Tensor, nn

from rewrite.observe.evidence import observe
from rewrite.runtime.inputs import ExampleCall, Inputs
from rewrite.streams.groups import values_of
from rewrite.streams.values import Values


def values(model: nn.Module, x: Tensor) -> Values:
    """Return the values of the one call of a model with `x`."""
    evidence = observe(model.eval(), (ExampleCall("given", Inputs.of((x,))),))
    (found,) = values_of(evidence)
    return found
