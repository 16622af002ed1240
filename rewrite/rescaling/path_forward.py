"""Add up all paths of a network in one forward, from its graph.

    Σ over paths of |Π weights|ᵖ  =  the network with |w|ᵖ for w, without relu, on ones

A path begins at an input, or at a bias, which is an edge from a unit of value 1; it ends at an
output. This holds where every operation is positively homogeneous (f(d x) = d f(x) for d > 0); any
other is refused with its line. A batch norm is the affine map of eval mode: x s + t.

Gonon et al. 2024, https://arxiv.org/abs/2310.01225, theorem A.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from rewrite.errors import CaptureError
from rewrite.graph.captured import Captured, Region, TensorRef
from rewrite.graph.operators import conv_of, linear_of, norm_of
from rewrite.graph.traits import Call, call_of
from rewrite.rescaling.folded import FoldedTensors
from rewrite.rescaling.path_algebra import PathAlgebra
from rewrite.rescaling.path_layers import Layers, NotHomogeneous, Powers, Weights
from rewrite.rescaling.path_operations import (
    ADDS,
    MULTIPLIES,
    Operations,
    asks,
    moves,
    passes,
)
from rewrite.runtime.leaves import tensors


@dataclass(frozen=True, eq=False)
class Constants:
    """The tensors that the code of one region reads itself, rather than through its layers."""

    _captured: Captured
    _region: Region

    def parameter(self, node: Node) -> TensorRef | None:
        """Return the parameter that a node reads, None if it reads anything else."""
        ref = self._captured.ref(node) if node.op == "get_attr" else None
        if ref is None:
            return None
        module: nn.Module = self._captured.module(ref.owner)
        return ref if module._parameters.get(ref.attr) is not None else None

    def value(self, name: str) -> Any:
        """Return a copy of the value of a name, floats in float64; code may write to it."""
        owner, _, attr = name.rpartition(".")
        value = self._region.constants.get(name)
        if value is None:
            value = getattr(self._captured.module(owner), attr)
        if not isinstance(value, Tensor):
            return value
        held = value.detach().clone()
        return held.double() if held.is_floating_point() else held


class PathForward:
    """The sum over all paths of one captured model.

    Args:
        captured: the model; its root has been traced.
        algebra: the semiring of path values.
        weights: returns `algebra.power` of a tensor of the model, in float64; by default of the
            model's own tensors. Gradients flow to what it returns.
        folded: the result of a fold for separate norms; a norm that directly follows a layer is
            merged with it. None: each norm is a layer of its own, with mean, scale and bias.

    Raises:
        CaptureError: the root was not traced as one graph.
    """

    def __init__(
        self,
        captured: Captured,
        algebra: PathAlgebra,
        weights: Weights | None = None,
        *,
        folded: FoldedTensors | None,
    ) -> None:
        self._captured = captured
        self._algebra = algebra
        self._weights = weights or Powers(captured, algebra)
        self._operations = Operations(captured, algebra, self._known)
        self._layers = Layers(captured, algebra, self._weights, folded)
        self._passes_on = {} if folded is None else folded.passes_on
        self._values: dict[Node, Any] = {}
        self._on_path: set[Node] = set()
        region = next((r for r in captured.regions if not r.name), None)
        if region is None:
            opaque = captured.opaque.get("")
            place = f" ({opaque.source})" if opaque and opaque.source else ""
            where = f": {opaque.reason}{place}" if opaque else ""
            raise CaptureError(
                f"{type(captured.model).__name__} was not traced as one graph{where}"
            )
        self.region = region
        self._constants = Constants(captured, region)

    def run(self, inputs: Iterable[Tensor | None]) -> Tensor:
        """Return the ⊕ over all paths to all outputs, a float64 scalar.

        Args:
            inputs: ones, one tensor a positional input of the forward; None for a default.

        Raises:
            CaptureError: an operation is not positively homogeneous; the message names its line.
        """
        given = iter(inputs)
        self._values, self._on_path = {}, set()
        last = {
            operand: node for node in self.region.graph.nodes for operand in node.all_input_nodes
        }
        for node in self.region.graph.nodes:
            if node.op == "output":
                return self._total(node)
            if node.op == "placeholder":
                self._placeholder(node, next(given, None))
            else:
                self._values[node] = self._evaluate(node)
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    del self._values[operand]  # a ResNet-152 in float64 would hold gigabytes
        raise CaptureError(f"{type(self._captured.model).__name__} returns nothing")

    # -- ends ---------------------------------------------------------------------------------

    def _placeholder(self, node: Node, value: Tensor | None) -> None:
        if value is not None:
            self._values[node] = value
            self._on_path.add(node)
        else:
            self._values[node] = node.args[0] if node.args else None

    def _total(self, output: Node) -> Tensor:
        total: Tensor | None = None
        returned: Any = map_arg(
            output.args[0], lambda n: self._values[n] if n in self._on_path else None
        )
        for value in tensors(returned):
            here = self._algebra.reduce(value.flatten(), (0,), False)
            total = here if total is None else self._algebra.plus(total, here)
        if total is None:
            raise CaptureError(f"no output of {type(self._captured.model).__name__} is on a path")
        return total

    def _evaluate(self, node: Node) -> Any:
        captured = self._captured
        if node.op == "get_attr":
            return self._constants.value(str(node.target))
        call = call_of(captured, node)
        inputs = [n for n in node.all_input_nodes if n in self._on_path]
        if not inputs or (call is not None and asks(call)):
            return self._call(node)
        self._on_path.add(node)
        if node in self._passes_on:
            return self._values[self._passes_on[node]]
        operator = conv_of(captured, node) or linear_of(captured, node) or norm_of(captured, node)
        if operator is not None:
            self._check_plain(node, operator.module)
            try:
                return self._layers.value(node, operator, self._values[operator.input])
            except NotHomogeneous as refused:
                raise self._refusal(node, str(refused)) from None
        if node.op == "call_module":
            self._check_plain(node, str(node.target))
        if (opaque := captured.opaque.get(str(node.target))) is not None:
            raise self._refusal(node, f"{opaque.name} was not traced: {opaque.reason}")
        return self._operation(node, call, inputs)

    def _operation(self, node: Node, call: Call | None, inputs: list[Node]) -> Any:
        """Return the value of an operation without weights of its own."""
        if call is None:
            raise self._refusal(node, "an operation that is not known to be homogeneous")
        if call.name in ADDS:
            return self._add(node, call.name)
        if call.name in MULTIPLIES:
            return self._multiply(node, call, inputs)
        if passes(call):
            return self._values[inputs[0]]
        if moves(call):
            self._check_moved(node, inputs)
            return self._call(node)
        result = self._operations.unary(node, call.name, self._values[inputs[0]])
        if result is None:
            raise self._refusal(node, f"{call.name} is not positively homogeneous")
        return result

    def _known(self, node: Node) -> Any:
        """Return a value that is computed from shapes and constants alone; None on a path."""
        return None if node in self._on_path else self._values[node]

    def _call(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._values[n])
        if node.op == "call_module":
            return self._captured.module(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            subject, *rest = args
            name = str(node.target)
            if name == "view" and not any(isinstance(value, torch.dtype) for value in rest):
                name = "reshape"  # without relu, a value may be a part of another in memory
            return getattr(subject, name)(*rest, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _check_moved(self, node: Node, inputs: list[Node]) -> None:
        """Raise on indexing by computed indices, and on concatenation with constants."""
        for operand in node.all_input_nodes:
            value = self._values[operand]
            if operand not in inputs and isinstance(value, Tensor) and value.is_floating_point():
                raise self._refusal(node, f"it joins paths with the constant {operand.name}")

    def _check_plain(self, node: Node, module: str | None) -> None:
        if module is not None:
            for reason in self._captured.hooks(module):
                if "hook" in reason or "forward" in reason:
                    raise self._refusal(node, f"{module} {reason}")

    # -- sums and products --------------------------------------------------------------------

    def _add(self, node: Node, name: str) -> Tensor:
        operands = _operands(node)
        alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        constant = name in ("maximum", "minimum") and any(v not in self._on_path for v in operands)
        if alpha != 1 or constant:
            raise self._refusal(node, f"{name} with other arguments than two values on paths")
        one, other = (self._powered(value) for value in operands)
        return self._algebra.plus(one, other)

    def _multiply(self, node: Node, call: Call, inputs: list[Node]) -> Tensor:
        one, other = _operands(node)
        both = isinstance(one, Node) and isinstance(other, Node)
        if both and one in self._on_path and other in self._on_path:
            raise self._refusal(node, "a product of two computed values is of the second degree")
        if call.get("rounding_mode") is not None:
            raise self._refusal(node, "it rounds")
        if call.name == "div":
            if other in inputs:
                raise self._refusal(node, "it divides by a computed value")
            return self._powered(one) / self._powered(other)
        return self._powered(one) * self._powered(other)

    def _powered(self, value: Any) -> Tensor:
        """Return a value on a path unchanged, and the power of a constant."""
        if isinstance(value, Node):
            if value in self._on_path:
                return cast(Tensor, self._values[value])
            if (ref := self._constants.parameter(value)) is not None:
                return self._weights(ref)
            value = self._values[value]
        constant = torch.as_tensor(value, dtype=torch.float64)
        return self._algebra.power(constant)

    def _refusal(self, node: Node, reason: str) -> CaptureError:
        where = self._captured.owner(node) or "the model"
        source = f" ({line})" if (line := self._captured.source(node)) else ""
        return CaptureError(f"{reason}: {node.name} in {where}{source}")


def _operands(node: Node) -> tuple[Any, Any]:
    """Return the two operands of a sum or a product."""
    one = node.args[0] if node.args else node.kwargs.get("input")
    other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    return one, other
