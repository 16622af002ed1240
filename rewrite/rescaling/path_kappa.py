"""The curvature of the squared path norm in each parameter, by one forward and one backward.

    γ²(w) = Σ over paths Π w_e²           κ_e = ½ ∂²γ²/∂w_e² = ∂γ²/∂(w_e²)

κ_e is the sum, over the paths through e, of the product of all their other weights squared.
Path-SGD divides by it (Neyshabur et al. 2015), and it is the diagonal of ∂Φᵀ∂Φ, which
path-conditioned training balances. Scaling w_e by d divides κ_e by d².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewrite.graph.captured import Captured, TensorRef
from rewrite.rescaling.path_algebra import PowerSum
from rewrite.rescaling.path_forward import PathForward
from rewrite.runtime.inputs import device_of


class PathCurvature:
    """κ of every parameter of one captured model, recomputed from its current weights.

    Args:
        captured: the model; a batch norm is taken as in eval mode, as a layer of its own.
        ones: tensors of ones, float64, in the shapes of its inputs; None for an omitted input.

    Raises:
        CaptureError: the root was not traced as one graph.
    """

    def __init__(self, captured: Captured, ones: Sequence[Tensor | None]) -> None:
        self._captured = captured
        self._ones = tuple(ones)
        self._squares: dict[int, Tensor] = {}
        self._forward = PathForward(captured, PowerSum(2), self._square, folded=None)

    def compute(self) -> dict[int, Tensor]:
        """Return κ of each parameter on a path, float64 and of its shape, by the parameter's `id`.

        Raises:
            CaptureError: the model is not positively homogeneous; the message names the line.
        """
        self._squares = {}
        with torch.enable_grad():
            total = self._forward.run(self._ones)
            leaves = list(self._squares.values())
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        named = zip(self._squares, leaves, found, strict=True)
        return {key: torch.zeros_like(leaf) if grad is None else grad for key, leaf, grad in named}

    def _square(self, ref: TensorRef) -> Tensor:
        tensor = self._captured.tensor(ref)
        if id(tensor) not in self._squares:
            self._squares[id(tensor)] = tensor.detach().double().square().requires_grad_()
        return self._squares[id(tensor)]


def ones_of(captured: Captured) -> tuple[Tensor | None, ...] | None:
    """Return ones in the shapes of the root's inputs, one sample each; None if a shape is unknown.

    An omitted optional input, or an empty `*args`, is None. A root that was not traced has no
    inputs: `PathForward` says why.
    """
    region = next((region for region in captured.regions if not region.name), None)
    ones: list[Tensor | None] = []
    if region is None:
        return ()
    device = device_of(captured.model)
    for node in region.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            shape = (1, *value.shape[1:]) if value.dim() > 1 else value.shape
            ones.append(torch.ones(shape, dtype=torch.float64, device=device))
        elif (value is None and node.args) or (isinstance(value, tuple | dict) and not value):
            ones.append(None)
        else:
            return None
    return tuple(ones)
