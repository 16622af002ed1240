"""Weight standardization of a layer's weight, and back: the value of the weight does not change."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewrite.graph.tensor_writer import TensorWriter
from rewrite.nn.weight_standardization import WeightStandardization
from rewrite.weights.layout import Layout
from rewrite.weights.tensor_recipe import Computed, Exact
from rewrite.weights.weight_norm import weight_refusal


class StandardizedWeight(Computed):
    """The weight of (step, g, o, v) in float64, which is stored as the layer computes it."""

    def __new__(cls, step: WeightStandardization, *sources: Tensor) -> StandardizedWeight:
        """Return the weight that `step` makes of g, o and v."""
        return super().__new__(cls, _weight, step, *sources)

    def terms(self) -> Tensor:
        """Return the size of what each value is the sum of: it cancels where the mean is large."""
        step, *sources = self.args
        size: Tensor = step.terms(*(tensor.double() for tensor in sources))
        return size


def _weight(step: WeightStandardization, gain: Tensor, offset: Tensor, v: Tensor) -> Tensor:
    return step.forward(gain.double(), offset.double(), v.double())


def sources_unrounded(module: nn.Module, place: str) -> Exact:
    """Return what g, o and v of a standardized weight are before they are rounded.

    `place` is the qualified name of what holds them; v is the weight as it was.
    """
    step, sources = _standardization(module)
    v = sources[-1]
    return {f"{place}.original{number}": partial(_source, step, v, number) for number in range(3)}


def _source(step: WeightStandardization, v: Tensor, number: int) -> Tensor:
    return step.right_inverse(v.double())[number]


def weight_unrounded(module: nn.Module) -> StandardizedWeight:
    """Return what the standardized weight of a layer is before it is rounded."""
    step, sources = _standardization(module)
    return StandardizedWeight(step, *sources)


def _standardization(module: nn.Module) -> tuple[WeightStandardization, list[Tensor]]:
    """Return what computes a standardized weight, and its g, o and v."""
    chain = module.get_submodule("parametrizations.weight")
    assert isinstance(chain, parametrize.ParametrizationList)
    step = chain[0]
    assert isinstance(step, WeightStandardization)
    return step, [tensor.detach() for tensor in chain.parameters()]


def is_standardized(module: nn.Module) -> bool:
    """Return whether the weight is computed by a weight standardization, and by it alone."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    chain = module.parametrizations["weight"]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
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
