"""One row of a signal report: a layer, and what activations and gradients do there."""

from __future__ import annotations

from dataclasses import dataclass

from rewrite.signals.jacobian import Jacobian


@dataclass(frozen=True)
class SignalRow:
    """One call of a layer or an activation, in data-flow order.

    `saturated` and `dead` are known for activations, `weight_grad_std` and `jacobian` for layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    std: float
    saturated: float | None = None
    dead: float | None = None
    grad_std: float | None = None
    weight_grad_std: float | None = None
    jacobian: Jacobian | None = None

    @property
    def is_layer(self) -> bool:
        """Whether this is a call of a layer with a weight."""
        return self.saturated is None
