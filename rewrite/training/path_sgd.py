"""Path-SGD: steepest descent in the path norm, which no rescaling of a network changes.

    w_e ← w_e - lr g_e / κ_e          κ_e = ½ ∂²γ²/∂w_e²,  γ² = Σ over paths Π w²

A rescaling by d multiplies w by d, divides g by d and κ by d²: the step is multiplied by d, as the
weight is, so that a step on the rescaled network is the rescaled step. κ costs one forward and one
backward of squared weights on one sample of ones, whatever the batch. Neyshabur et al. 2015,
https://arxiv.org/abs/1506.02617.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rewrite.errors import OptionError
from rewrite.graph.capture import capture
from rewrite.rescaling.path_kappa import PathCurvature, ones_of
from rewrite.runtime.modes import evaluating


class PathSGD(Optimizer):
    """Stochastic gradient descent that divides each gradient by the curvature of the path norm.

    A weight on no path (its unit is dead) has κ = 0, and does not change.

    Args:
        model: the model to train, any that `rewrite.path_norm` accepts. Batch norms are taken as
            in eval mode, with their running statistics.
        params: parameters, or groups with `lr` and `momentum` of their own; default: all.
        lr: the learning rate, not comparable to SGD's: the direction is g / κ.
        momentum: momentum of the directions, in [0, 1).
        interval: recompute κ after so many steps.
        example_inputs: a tensor or a tuple of positional inputs; only shapes are used.

    Raises:
        CaptureError: the model is not positively homogeneous; the message names the line.
        OptionError: a number is out of range, no input shape is known, or a parameter of
            `params` is on no path.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float,
        momentum: float = 0.0,
        interval: int = 1,
        example_inputs: Any,
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1 or interval < 1:
            raise OptionError(
                f"lr is {lr}, momentum {momentum}, interval {interval}; pass lr >= 0, momentum in "
                "[0, 1) and interval >= 1"
            )
        with evaluating(model):
            captured = capture(model, example_inputs)
            ones = ones_of(captured)
            if ones is None:
                raise OptionError("the shape of an input is unknown; pass example_inputs")
            self._curvature = PathCurvature(captured, ones)
            self._curvature.compute()  # a model that has no paths is refused before it is trained
        self._model = model
        self._interval = interval
        self._steps = 0
        self._kappa: dict[int, Tensor] = {}
        given = list(model.parameters()) if params is None else params
        super().__init__(given, {"lr": lr, "momentum": momentum})

    def kappa(self) -> dict[str, Tensor]:
        """Return κ of every parameter on a path, float64 and of its shape, by qualified name."""
        found = self._compute()
        return {
            name: found[id(parameter)]
            for name, parameter in self._model.named_parameters()
            if id(parameter) in found
        }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the gradients and returns the loss.

        Raises:
            OptionError: a parameter has a gradient but is on no path.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._steps % self._interval == 0:
            self._kappa = self._compute()
        self._steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["momentum"])
        return loss

    def _compute(self) -> dict[int, Tensor]:
        with evaluating(self._model):
            return self._curvature.compute()

    def _move(self, parameter: Tensor, lr: float, momentum: float) -> None:
        kappa = self._kappa.get(id(parameter))
        if kappa is None:
            shape = "x".join(map(str, parameter.shape))
            raise OptionError(
                f"a parameter of shape {shape} has a gradient and is on no path of the graph; "
                "leave it to another optimizer (params=...)"
            )
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        direction = torch.where(kappa > 0, gradient / kappa, 0.0).to(parameter.dtype)
        if momentum:
            state = self.state[parameter]
            held = state.get("momentum_buffer")
            if held is None:
                held = state["momentum_buffer"] = direction.clone()
            else:
                held.mul_(momentum).add_(direction)
            direction = held
        parameter.add_(direction, alpha=-lr)
