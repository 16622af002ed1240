"""The path norm: a norm over all paths of a network, which no rescaling changes.

    ‖Φ‖_p = (Σ over paths of |Π weights on the path|ᵖ)^(1/p),   p = ∞: the largest

It is one forward on ones with |w|ᵖ in place of w, after folding batch norms (`path_forward`). A
rescaling W₁ → D W₁, W₂ → W₂ D⁻¹ multiplies and divides each path by the same. Gonon et al. 2024,
https://arxiv.org/abs/2310.01225; Neyshabur et al. 2015, https://arxiv.org/abs/1506.02617.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import CaptureError, OptionError, RewriteError, one_line
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.rescaling.folded import FoldedTensors, fold_on_paper
from rewrite.rescaling.path_algebra import Largest, PathAlgebra, PowerSum
from rewrite.rescaling.path_forward import PathForward
from rewrite.runtime.copying import copy_model
from rewrite.runtime.infer_inputs import infer_inputs
from rewrite.runtime.inputs import Inputs, call, device_of
from rewrite.runtime.modes import evaluating
from rewrite.runtime.tree import Tree
from rewrite.runtime.trial import trial


@dataclass(frozen=True)
class RegionNorm:
    """The path norm of one module, or why it has none.

    Attributes:
        name: the qualified name; "" for the whole model.
        norms: the norm for each p; empty if there is none.
        reason: the operation that is not positively homogeneous, with its line.
    """

    name: str
    norms: dict[float, float]
    reason: str = ""


def path_norm(model: nn.Module, p: float = 2, example_inputs: Any = None) -> float:
    """Return the path norm of `model` in eval mode, computed in float64.

    Args:
        model: a network of positively homogeneous operations, in any mode and dtype; it does not
            change.
        p: 1, 2 or another number > 0; `math.inf` for the largest path.
        example_inputs: a tensor, or a tuple of positional inputs, with the samples along axis 0;
            only shapes are used. Without them an input is inferred where possible.

    Returns:
        (Σ |path|ᵖ)^(1/p) over all paths from inputs and biases to outputs.

    Raises:
        CaptureError: an operation is not positively homogeneous (a tanh, a layer norm), or the
            forward cannot be traced; the message names the line.
        OptionError: p is not positive, no input is known, a tensor holds values that are not
            finite, or the sum overflows float64.
    """
    return path_norms(model, (p,), example_inputs)[p]


def path_norms(
    model: nn.Module, ps: tuple[float, ...] = (1, 2, math.inf), example_inputs: Any = None
) -> dict[float, float]:
    """Return the path norm for each p; the model is captured and folded once.

    Raises:
        CaptureError, OptionError: as `path_norm`.
    """
    algebras = {p: _algebra(p) for p in ps}
    ones = _ones(model, example_inputs)
    with evaluating(model), torch.no_grad():
        captured, folded = _folded(model, ones)
        try:
            found = {p: float(_run(captured, a, folded, ones)) for p, a in algebras.items()}
        except RewriteError:
            raise
        except Exception as error:  # whatever an operation raises on a shape that does not fit
            raise _does_not_run(error) from error
    for p, value in found.items():
        if not math.isfinite(value):
            if (broken := _not_finite(model)) is not None:
                raise OptionError(f"{broken} holds values that are not finite")
            raise OptionError(
                f"the sum over paths for p = {p:g} overflows float64; take a smaller p"
            )
    return found


def path_norms_by_region(
    model: nn.Module, ps: tuple[float, ...] = (1, 2, math.inf), example_inputs: Any = None
) -> Iterator[RegionNorm]:
    """Yield the path norms of the model; if it has none, the reason, and those of its parts.

    The parts are the largest submodules with several layers that have path norms, each computed on
    ones of the shape that the submodule gets in a run of the model.

    Raises:
        OptionError: no input is known, or the model raises on it.
    """
    inputs = _inputs(model, example_inputs)
    try:
        yield RegionNorm("", path_norms(model, ps, inputs.args))
    except (CaptureError, OptionError) as error:
        yield RegionNorm("", {}, str(error))
        yield from _parts(model, "", ps, _observed(model, inputs))


def _parts(
    model: nn.Module, name: str, ps: tuple[float, ...], seen: dict[str, Any]
) -> Iterator[RegionNorm]:
    """Yield the largest modules below `name` that have path norms."""
    for key, child in Tree(model).get(name).named_children():
        below = f"{name}.{key}" if name else key
        if not any(True for _ in child.children()):
            continue
        if below in seen:
            try:
                yield RegionNorm(below, path_norms(child, ps, seen[below]))
                continue
            except (CaptureError, OptionError):
                pass  # its own parts may have one
        yield from _parts(model, below, ps, seen)


def _observed(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Run the model once, and return the positional inputs of each module, by name."""
    found: dict[str, Any] = {}
    with trial(model) as copied:
        for name, module in Tree(copied).modules():

            def note(_: nn.Module, args: Any, name: str = name) -> None:
                if all(isinstance(value, Tensor) and value.is_floating_point() for value in args):
                    found.setdefault(name, args)

            if name:
                module.register_forward_pre_hook(note)
        try:
            call(copied, inputs.clone())
        except Exception as error:  # whatever the forward of a model raises
            raise _does_not_run(error) from error
    return found


def _does_not_run(error: Exception) -> OptionError:
    return OptionError(f"the model does not run on the input: {one_line(error)}")


# -- inputs ---------------------------------------------------------------------------------------


def _not_finite(model: nn.Module) -> str | None:
    """Return the name of a parameter or buffer that holds a NaN or an infinity."""
    held = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in held if not bool(tensor.isfinite().all())), None)


def _algebra(p: float) -> PathAlgebra:
    if math.isnan(p) or p <= 0:
        raise OptionError(f"p is {p}; pass a number > 0, or math.inf for the largest path")
    return Largest() if math.isinf(p) else PowerSum(p)


def _inputs(model: nn.Module, given: Any) -> Inputs:
    if given is None:
        inferred = infer_inputs(model, quick=True)
        if inferred.inputs is None:
            raise OptionError(
                f"{inferred.missing}; pass example_inputs, such as torch.zeros(1, 3, 32, 32)"
            )
        found = Inputs.of(inferred.inputs)
        bound = inspect.signature(model.forward).bind(*found.args, **found.kwargs)
        inputs = Inputs(bound.args, bound.kwargs)
    else:
        inputs = Inputs.of(given)
    if inputs.kwargs:
        raise OptionError("a path norm takes positional inputs; pass a tensor or a tuple")
    return inputs


def _ones(model: nn.Module, given: Any) -> tuple[Tensor, ...]:
    """Return ones in the shapes of the inputs, one sample each."""
    inputs = _inputs(model, given).args
    wrong = next(
        (x for x in inputs if not isinstance(x, Tensor) or not x.is_floating_point()), None
    )
    if wrong is not None:
        what = f"of dtype {wrong.dtype}" if isinstance(wrong, Tensor) else f"{wrong!r}"
        raise CaptureError(f"an input is {what}: a network is not homogeneous in it")
    device = device_of(model)
    return tuple(
        torch.ones_like(x[:1] if x.dim() > 1 else x, dtype=torch.float64, device=device)
        for x in inputs
    )


def _folded(model: nn.Module, ones: tuple[Tensor, ...]) -> tuple[Captured, FoldedTensors]:
    """Return the captured model and the result of folding it, in float64."""
    captured = capture(model)
    folded = fold_on_paper(captured)
    if folded.planner is None:
        return captured, folded
    # The ledger writes in the dtype of the model, and needs the number of axes of every value.
    captured = capture(copy_model(model).double(), ones)
    return captured, fold_on_paper(captured)


def _run(
    captured: Captured, algebra: PathAlgebra, folded: FoldedTensors, ones: tuple[Tensor, ...]
) -> Tensor:
    return algebra.norm(PathForward(captured, algebra, folded=folded).run(ones))
