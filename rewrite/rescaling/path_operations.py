"""Operations without weights of their own, as maps of sums over paths.

    activation    relu, leaky_relu, abs, dropout       the identity: y = x
    movement      flatten, permute, cat, chunk, pad    the same movement
    max pooling   each value of the window is on a path of its own: ⊕ (Gonon et al. 2024, "sum")
    mean of n     n edges of weight 1/n: ⊕, times |1/n|ᵖ
    product       with a constant c: an edge of weight c; of two values: not homogeneous
    sum           of two values: ⊕; with a constant: a bias

Definition: Gonon et al. 2024, "A path-norm toolkit for modern networks", as in its implementation
`pathnorm-pytorch`: max pooling sums, average pooling is linear, and the slope of a leaky ReLU
belongs to the activation, not to the path. Any other operation is not known to be positively
homogeneous (`rewrite.graph.traits` classifies operations).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.graph.traits import Call, Shape, Trait, argument
from rewrite.rescaling.clipped import rectifies
from rewrite.rescaling.path_algebra import PathAlgebra, PowerSum, Window, adaptive_counts

ADDS = frozenset({"add", "sub", "rsub", "maximum", "minimum"})


MULTIPLIES = frozenset({"mul", "div"})


_SUMS_UP = frozenset({"fold"})
"""Moves values and adds up those that meet."""


def asks(call: Call) -> bool:
    """Return whether a call only reads the shape, dtype or device of a value."""
    return Trait.ASKS in call.operation.traits or call.name == "getattr"


def moves(call: Call) -> bool:
    """Return whether a call only moves values."""
    return Trait.MOVES in call.operation.traits and call.name not in _SUMS_UP


def passes(call: Call) -> bool:
    """Return whether a call is elementwise with f(d x) = d f(x) for d > 0."""
    row = call.operation
    if rectifies(call):
        return True
    if Trait.CASTS in row.traits:
        given = (*call.node.args, *call.node.kwargs.values())
        if any(isinstance(a, torch.dtype) and not a.is_floating_point for a in given):
            return False
    linked = row.traits & (Trait.ADDS | Trait.MULTIPLIES | Trait.ROUNDS | Trait.MOVES)
    return row.hands_on and row.shape is Shape.SAME and not linked


_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


class Operations:
    """The operations without weights, evaluated in one semiring.

    Args:
        captured: the model.
        algebra: the semiring of path values.
        known: returns a value that is computed from shapes; None if it depends on the input.
    """

    def __init__(
        self, captured: Captured, algebra: PathAlgebra, known: Callable[[Node], Any]
    ) -> None:
        self._captured = captured
        self._algebra = algebra
        self._known = known

    def unary(self, node: Node, name: str, x: Tensor) -> Tensor | None:
        """Return the value of pooling, a reduction, padding or resizing; None for other calls.

        Args:
            node: the call.
            name: the canonical name of the operation.
            x: its first input, float64.
        """
        if "pool" in name:
            return self._pool(node, name, x)
        if name in ("mean", "sum", "amax", "amin"):
            return self._reduce(node, name, x)
        if name == "interpolate":
            return self._resize(node, x)
        if name == "pad":
            return self._pad(node, x)
        return None

    # -- pooling ------------------------------------------------------------------------------

    def _pool(self, node: Node, name: str, x: Tensor) -> Tensor | None:
        dims = next((int(digit) for digit in name if digit.isdigit()), 0)
        if dims not in (1, 2, 3) or "unpool" in name or "fractional" in name:
            return None
        batched = x if x.dim() == dims + 2 else x.unsqueeze(0)
        if "adaptive" in name:
            result = self._adaptive(node, name, batched, dims)
        elif "max" in name:
            window = self._max_window(node, dims)
            result = None if window is None else self._algebra.pool(batched, window)
        else:
            result = self._average(node, batched, dims) if "avg" in name else None
        return result if result is None or batched is x else result.squeeze(0)

    def _adaptive(self, node: Node, name: str, x: Tensor, dims: int) -> Tensor | None:
        given = self._option(node, 1, "output_size", None)
        sizes = (given,) * dims if isinstance(given, int) else tuple(given or ())
        if len(sizes) != dims or self._option(node, 2, "return_indices", False):
            return None
        size = [x.shape[2 + i] if s is None else int(s) for i, s in enumerate(sizes)]
        total = self._algebra.adaptive(x, size)
        if "max" in name:
            return total
        return total * self._algebra.power(adaptive_counts(x, size).reciprocal())

    def _max_window(self, node: Node, dims: int) -> Window | None:
        if self._option(node, 6, "return_indices", False):
            return None
        kernel = _each(self._option(node, 1, "kernel_size", None), dims)
        stride = self._option(node, 2, "stride", None)
        return Window(
            kernel,
            kernel if stride in (None, [], ()) else _each(stride, dims),
            _each(self._option(node, 3, "padding", 0), dims),
            _each(self._option(node, 4, "dilation", 1), dims),
            bool(self._option(node, 5, "ceil_mode", False)),
        )

    def _average(self, node: Node, x: Tensor, dims: int) -> Tensor:
        """Return the ⊕ over windows, each times the power of 1 over the divisor of its mean."""
        kernel = _each(self._option(node, 1, "kernel_size", None), dims)
        stride = self._option(node, 2, "stride", None)
        stride = kernel if stride in (None, [], ()) else _each(stride, dims)
        padding = _each(self._option(node, 3, "padding", 0), dims)
        ceil_mode = bool(self._option(node, 4, "ceil_mode", False))
        counted = bool(self._option(node, 5, "count_include_pad", True))
        divisor = self._option(node, 6, "divisor_override", None)
        window = Window(kernel, stride, padding, (1,) * dims, ceil_mode)
        ones = torch.ones_like(x[:1, :1])
        if dims == 1:
            mean = F.avg_pool1d(ones, kernel, stride, padding, ceil_mode, counted)
        else:
            pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
            mean = pool(ones, kernel, stride, padding, ceil_mode, counted, divisor)
        counts = PowerSum(1).pool(ones, window).clamp(min=1)
        return self._algebra.pool(x, window) * self._algebra.power(mean / counts)

    # -- reductions ---------------------------------------------------------------------------

    def _reduce(self, node: Node, name: str, x: Tensor) -> Tensor | None:
        dims = argument(node, 1, "dim")
        if isinstance(dims, Node):
            return None
        keepdim = bool(argument(node, 2, "keepdim", False))
        axes = range(x.dim()) if dims in (None, (), []) else dims
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        total = self._algebra.reduce(x, axes, keepdim)
        if name != "mean":
            return total
        count = 1.0
        for axis in axes:
            count *= x.shape[axis]
        return total * self._algebra.power(x.new_tensor(1 / count))

    # -- resizing and padding -----------------------------------------------------------------

    def _resize(self, node: Node, x: Tensor) -> Tensor | None:
        """Resize axis by axis: a linear mode is a product with one matrix per axis."""
        mode = str(self._option(node, 3, "mode", "nearest"))
        sizes = self._option(node, 1, "size", None)
        factors = self._option(node, 2, "scale_factor", None)
        corners = self._option(node, 4, "align_corners", None)
        dims = x.dim() - 2
        if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area"):
            return None
        if sizes is None and factors is None:
            return None
        if self._option(node, 5, "recompute_scale_factor", None) or argument(node, 6, "antialias"):
            return None
        for axis in range(dims):
            size = None if sizes is None else _each(sizes, dims)[axis]
            factor = None if factors is None else tuple(_each(factors, dims))[axis]
            identity = torch.eye(x.shape[2 + axis], dtype=x.dtype, device=x.device).unsqueeze(1)
            along = "linear" if mode.endswith("linear") else mode
            align = corners if along == "linear" else None
            matrix = F.interpolate(identity, size, factor, along, align).squeeze(1).T
            moved = x.movedim(2 + axis, -1)
            x = self._algebra.linear(moved, self._algebra.power(matrix)).movedim(-1, 2 + axis)
        return x

    def _pad(self, node: Node, x: Tensor) -> Tensor | None:
        sizes = self._option(node, 1, "pad", None)
        if node.op == "call_module":
            module: Any = self._captured.module(str(node.target))
            if not isinstance(module, _CONSTANT_PADS):
                return cast(Tensor, module(x))
            sizes, mode, fill = module.padding, "constant", module.value
        else:
            mode, fill = argument(node, 2, "mode", "constant"), argument(node, 3, "value", 0)
        if not isinstance(sizes, list | tuple) or not all(isinstance(n, int) for n in sizes):
            return None
        if mode != "constant":
            return F.pad(x, list(sizes), mode)
        if not isinstance(fill, int | float | None):
            return None
        fill = 0.0 if fill == -math.inf else float(fill or 0)  # no maximum takes it: no path
        value = float(self._algebra.power(torch.tensor(fill, dtype=x.dtype)))
        return F.pad(x, list(sizes), value=value)

    def _option(self, node: Node, position: int, name: str, default: Any) -> Any:
        """Return an option of a layer or of a call; a computed size is replaced by its value.

        None if it depends on values of the input, also within a list.
        """
        if node.op == "call_module":
            module: nn.Module = self._captured.module(str(node.target))
            return getattr(module, name, default)
        given = argument(node, position, name, default)
        values = given if isinstance(given, list | tuple) else (given,)
        known = [self._known(v) if isinstance(v, Node) else v for v in values]
        if any(isinstance(v, Node) and k is None for v, k in zip(values, known, strict=True)):
            return None
        return known if isinstance(given, list | tuple) else known[0]


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    if isinstance(value, int | float):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1)
