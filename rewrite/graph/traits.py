"""What each operation does, in one table: a canonical name, its spellings, its traits.

    SHIFTS           f(x + c) = f(x) + c      c: one value per channel
    SCALES           f(s.x) = s.f(x)          every s; with SCALES_POSITIVE: every s > 0
    ZERO             f(0) = 0

The equations are in the first operand, on every axis that the operation does not mix. One row
stands for one operation, however it is spelled: a function of `torch` or `torch.nn.functional` and
its aliases, a method, an operator of Python, a form in place (`relu_`), an overload of `aten`, a
module of `torch.nn`. A function of other code is not known by its name: `operation` returns None,
and whoever asks has to decline.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.spellings import MODULES, is_plain, plain_name

if TYPE_CHECKING:
    from rewrite.graph.captured import Captured


class Trait(enum.Flag):
    """One thing that is true of an operation; the equations stand in the module's docstring."""

    NONE = 0
    SHIFTS = enum.auto()
    SCALES_POSITIVE = enum.auto()
    _SCALES_NEGATIVE = enum.auto()
    SCALES = SCALES_POSITIVE | _SCALES_NEGATIVE
    ZERO = enum.auto()
    IDENTITY = SHIFTS | SCALES | ZERO
    """Those of y = x; averages share them."""
    MOVES = enum.auto()
    """The same values, elsewhere: which channel is where has to be followed."""
    ADDS = enum.auto()
    """y = a x + b z"""
    MULTIPLIES = enum.auto()
    """y = x z or x / z, or what rounds a quotient"""
    ROUNDS = enum.auto()
    """To integers or to a grid: no equation holds."""
    CASTS = enum.auto()
    """To another dtype: the equations hold if it is one of floating point."""
    SPLITS = enum.auto()
    JOINS = enum.auto()
    CONTRACTS = enum.auto()
    """A product of matrices."""
    LAYER = enum.auto()
    """A product with a weight, by its second operand, or rows of a table."""
    DROPS = enum.auto()
    """In training mode it sets values to zero at random; else it is the identity."""
    ASKS = enum.auto()
    """Reads the shape, dtype or device of its first operand and nothing else."""
    LIKE_SECOND = enum.auto()
    """Reads the shape or dtype of its second operand and nothing else."""
    VIEWS = enum.auto()
    """It may return its first operand itself, or a view of its memory."""
    PURE = enum.auto()
    """Its value hangs on its operands alone, so it may be computed ahead of time."""


class Shape(enum.Enum):
    """What becomes of the axes of the first operand."""

    SAME = "axis by axis those of the widest operand"
    SAME_RANK = "as many axes, of other lengths or in another order"
    REDUCED = "without those that the argument dim names"
    FLATTENED = "start_dim to end_dim become one"
    LISTED = "as an argument lists them"
    LIKE_SECOND = "those of the second operand"
    LONGER = "one more"
    OTHER = "something else"


SPATIAL = -1
"""Axes that an operation mixes: all behind the second."""


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        name: the canonical name.
        spellings: every plain name that a function or a method has for it, `name` first.
        arguments: behind the first operand, in order; "dim|axis" has two keywords, "*dims" takes
            all that follow.
        traits, shape: what it does.
        mixes: how many of the last axes an output position reads neighbours along.
    """

    name: str
    spellings: tuple[str, ...]
    arguments: tuple[str, ...]
    traits: Trait
    shape: Shape
    mixes: int = 0

    @property
    def hands_on(self) -> bool:
        """Whether it hands on its first operand, scaled, averaged or moved; f(0) = 0."""
        return Trait.ZERO | Trait.SCALES_POSITIVE in self.traits


@dataclass(frozen=True)
class Call:
    """One call of an operation, its arguments bound by name.

    `module` is the layer of torch.nn that is called, None for a function or a method.
    """

    operation: Operation
    node: Node
    module: nn.Module | None

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.operation.name

    @property
    def operand(self) -> Any:
        """The first operand: a node, unless a number comes first (`1 - x`)."""
        if self.node.args:
            return self.node.args[0]
        return next((self.node.kwargs[k] for k in ("input", "self") if k in self.node.kwargs), None)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument by one of its keywords, wherever it was given."""
        for place, spelled in enumerate(self.operation.arguments):
            keywords = spelled.lstrip("*").split("|")
            if name not in keywords:
                continue
            if self.module is not None:
                held = (getattr(self.module, k) for k in keywords if hasattr(self.module, k))
                return next(held, default)
            if spelled.startswith("*") and len(self.node.args) > place + 1:
                rest = self.node.args[place + 1 :]
                single = len(rest) == 1 and isinstance(rest[0], list | tuple)
                return tuple(rest[0]) if single else rest  # type: ignore[arg-type]  # a single argument is a sequence of axes
            if len(self.node.args) > place + 1:
                return self.node.args[place + 1]
            return next((self.node.kwargs[k] for k in keywords if k in self.node.kwargs), default)
        return default

    def terms(self) -> tuple[tuple[Any, Any], tuple[Any, Any]] | None:
        """Return y = a x + b z as ((x, a), (z, b)), or None if the call is no such sum."""
        if Trait.ADDS not in self.operation.traits:
            return None
        one, other, alpha = self.operand, self.get("other"), self.get("alpha", 1)
        if isinstance(alpha, Node):
            return None
        if self.name == "rsub":
            return (one, -alpha), (other, 1)
        return (one, 1), (other, alpha if self.name == "add" else -alpha)


# -- the table ------------------------------------------------------------------------------------

_ROW = re.compile(r"([\w/]+)(?:\(([^)]*)\))?")


def _rows(text: str, traits: Trait, shape: Shape, mixes: int = 0) -> Iterator[Operation]:
    """Yield the operations of `text`: "name/spelling/spelling(argument, argument|keyword) …"."""
    for spelled, arguments in _ROW.findall(text):
        names = tuple(spelled.split("/"))
        given = tuple(part.strip() for part in arguments.split(",") if part.strip())
        yield Operation(names[0], names, given, traits, shape, mixes)


_PURE, _ZERO, _NONE = Trait.PURE, Trait.ZERO, Trait.NONE
_IDENTITY = Trait.IDENTITY | _PURE
_LINEAR = Trait.SCALES | _ZERO | _PURE
_HOMOGENEOUS = Trait.SCALES_POSITIVE | _ZERO
_MAXIMUM = Trait.SHIFTS | _HOMOGENEOUS


def _elementwise() -> Iterator[Operation]:
    same = Shape.SAME
    yield from _rows("add/iadd/__add__/__radd__/__iadd__(other, alpha) "
                     "sub/subtract/isub/__sub__/__isub__(other, alpha) "
                     "rsub/__rsub__(other, alpha)", Trait.ADDS | _PURE, same)  # fmt: skip
    yield from _rows("mul/multiply/imul/__mul__/__rmul__/__imul__(other)",
                     Trait.MULTIPLIES | _LINEAR, same)  # fmt: skip
    yield from _rows("div/divide/true_divide/truediv/itruediv/__truediv__/__itruediv__/__idiv__"
                     "(other, rounding_mode)", Trait.MULTIPLIES | _LINEAR, same)  # fmt: skip
    yield from _rows("floor_divide/floordiv/ifloordiv/__floordiv__(other) "
                     "remainder/mod/__mod__(other) fmod(other)", Trait.ROUNDS, same)  # fmt: skip
    yield from _rows("round(decimals) floor ceil trunc/fix sign/sgn", Trait.ROUNDS | _ZERO, same)
    yield from _rows("neg/negative/__neg__", _LINEAR, same)
    yield from _rows("clone/lift_fresh_copy", _IDENTITY, same)
    yield from _rows("identity contiguous detach/alias positive/pos cpu cuda requires_grad",
                     _IDENTITY | Trait.VIEWS, same)  # fmt: skip
    casts = _IDENTITY | Trait.CASTS | Trait.VIEWS
    yield from _rows("to/_to_copy(*dtype) type(dtype) float double half bfloat16", casts, same)
    yield from _rows("type_as(other)", casts | Trait.LIKE_SECOND, same)
    yield from _rows("int/long/short/char/byte/bool", Trait.ROUNDS | Trait.VIEWS, same)
    yield from _rows("dropout/dropout1d/dropout2d/dropout3d/feature_dropout"
                     "(p, training|train, inplace) stochastic_depth(p, mode, training) "
                     "drop_path(drop_prob|p, training) "
                     "alpha_dropout/feature_alpha_dropout(p, training|train, inplace)",
                     Trait.IDENTITY | Trait.DROPS | Trait.VIEWS, same)  # fmt: skip
    yield from _rows("relu(inplace) leaky_relu(negative_slope, inplace) "
                     "prelu/_prelu_kernel(weight) rrelu(lower, upper, training, inplace)",
                     _HOMOGENEOUS, same)  # fmt: skip
    yield from _rows("abs/absolute", _HOMOGENEOUS | _PURE, same)
    yield from _rows("relu6(inplace) elu(alpha, inplace) celu(alpha, inplace) selu(inplace) "
                     "gelu(approximate) silu(inplace) mish(inplace) hardswish(inplace) "
                     "hardtanh(min_val, max_val, inplace) softsign tanhshrink hardshrink "
                     "softshrink", _ZERO, same)  # fmt: skip
    yield from _rows("tanh sqrt square sin asin atan erf expm1 log1p", _ZERO | _PURE, same)
    yield from _rows("exp rsqrt reciprocal sigmoid/expit softplus "
                     "pow/__pow__/ipow(exponent) clamp/clip(min, max) clamp_min(min) "
                     "clamp_max(max) log", _PURE, same)  # fmt: skip
    yield from _rows("hardsigmoid(inplace) logsigmoid/log_sigmoid softmax/_softmax(dim) "
                     "log_softmax/_log_softmax(dim) softmin(dim) "
                     "threshold/_threshold(threshold, value, inplace) where maximum(other) "
                     "minimum(other) lerp(end, weight) addcmul(tensor1, tensor2, value) "
                     "addcdiv(tensor1, tensor2, value) masked_fill normalize "
                     "batch_norm/native_batch_norm group_norm layer_norm rms_norm instance_norm "
                     "cumsum(dim)", _NONE, same)  # fmt: skip


def _pooling() -> Iterator[Operation]:
    wide = Shape.SAME_RANK
    for axes in (1, 2, 3):
        yield from _rows(f"avg_pool{axes}d(kernel_size, stride, padding, ceil_mode, "
                         "count_include_pad, divisor_override) "
                         f"adaptive_avg_pool{axes}d(output_size)",
                         Trait.IDENTITY, wide, axes)  # fmt: skip
        yield from _rows(f"max_pool{axes}d(kernel_size, stride, padding, dilation, ceil_mode, "
                         "return_indices) "
                         f"adaptive_max_pool{axes}d(output_size, return_indices)",
                         _MAXIMUM, wide, axes)  # fmt: skip
        yield from _rows(f"max_pool{axes}d_with_indices adaptive_max_pool{axes}d_with_indices",
                         _ZERO, Shape.OTHER, axes)  # fmt: skip
        # Values go back to where they were found, with zeros between them.
        yield from _rows(f"max_unpool{axes}d(indices)", _LINEAR, wide, axes)
        yield from _rows(f"lp_pool{axes}d", _ZERO, wide, axes)
    yield from _rows("interpolate/upsample/upsample_nearest/upsample_bilinear/upsample_nearest1d/"
                     "upsample_nearest2d/upsample_nearest3d/upsample_bilinear2d/"
                     "upsample_bicubic2d", Trait.IDENTITY, wide, SPATIAL)  # fmt: skip
    yield from _rows("fold unfold/im2col", _LINEAR | Trait.MOVES | Trait.VIEWS, Shape.OTHER)
    yield from _rows("pad(pad|padding, mode, value) constant_pad_nd(pad, value)",
                     Trait.IDENTITY | Trait.VIEWS, wide)  # fmt: skip
    yield from _rows("mean(dim|axis, keepdim|keepdims, dtype)", Trait.IDENTITY, Shape.REDUCED)
    yield from _rows("sum(dim|axis, keepdim|keepdims, dtype)", _LINEAR, Shape.REDUCED)
    yield from _rows("amax(dim|axis, keepdim|keepdims) amin(dim|axis, keepdim|keepdims)",
                     _MAXIMUM, Shape.REDUCED)  # fmt: skip
    yield from _rows("max(dim|axis, keepdim) min(dim|axis, keepdim)", _NONE, Shape.OTHER)
    yield from _rows("var(dim|axis, unbiased|correction, keepdim|keepdims) "
                     "std(dim|axis, unbiased|correction, keepdim|keepdims) "
                     "prod(dim|axis, keepdim|keepdims) norm(p, dim, keepdim)",
                     _NONE, Shape.REDUCED)  # fmt: skip


def _moves() -> Iterator[Operation]:
    wide, moves = Shape.SAME_RANK, _IDENTITY | Trait.MOVES
    views = moves | Trait.VIEWS
    yield from _rows("permute(*dims) transpose/swapaxes/swapdims(dim0|axis0, dim1|axis1) t "
                     "movedim/moveaxis(source, destination) narrow(dim, start, length) "
                     "slice(dim, start, end, step)", views, wide)  # fmt: skip
    yield from _rows("pixel_shuffle(upscale_factor) pixel_unshuffle(downscale_factor) "
                     "channel_shuffle/native_channel_shuffle(groups) rot90(k, dims) "
                     "index_select(dim, index) gather", moves, wide)  # fmt: skip
    yield from _rows("roll(shifts, dims) flip(*dims)", moves, Shape.SAME)
    yield from _rows("flatten(start_dim, end_dim)", views, Shape.FLATTENED)
    yield from _rows("view/reshape/_unsafe_view(*shape|size) expand(*size)", views, Shape.LISTED)
    yield from _rows("repeat(*repeats) tile(dims)", moves, Shape.LISTED)
    yield from _rows("reshape_as/view_as(other) expand_as(other)",
                     views | Trait.LIKE_SECOND, Shape.LIKE_SECOND)  # fmt: skip
    yield from _rows("unsqueeze(dim)", views, Shape.LONGER)
    yield from _rows("squeeze(*dim) unflatten(dim, sizes|unflattened_size) select(dim, index) "
                     "getitem/__getitem__(index)", views, Shape.OTHER)  # fmt: skip
    yield from _rows("chunk(chunks, dim) split/split_with_sizes(split_size_or_sections|split_size|"
                     "split_sizes, dim) tensor_split(indices_or_sections, dim) unbind(dim)",
                     views | Trait.SPLITS, Shape.OTHER)  # fmt: skip
    yield from _rows("cat/concat/concatenate(dim|axis)", moves | Trait.JOINS, wide)
    yield from _rows("stack(dim)", moves | Trait.JOINS, Shape.OTHER)


def _others() -> Iterator[Operation]:
    yield from _rows("matmul/__matmul__/imatmul bmm", Trait.CONTRACTS, Shape.SAME_RANK)
    yield from _rows("scaled_dot_product_attention", Trait.CONTRACTS, Shape.SAME_RANK)
    yield from _rows("einsum", Trait.CONTRACTS, Shape.OTHER)
    yield from _rows("linear conv1d conv2d conv3d", Trait.LAYER, Shape.SAME_RANK)
    yield from _rows("glu(dim)", _NONE, Shape.SAME_RANK)
    yield from _rows("size/sym_size dim/ndimension numel/sym_numel stride/sym_stride is_contiguous "
                     "get_device is_floating_point is_complex len is_tensor new_zeros new_ones "
                     "new_empty zeros_like ones_like empty_like rand_like randn_like "
                     "new_full full_like new_tensor", Trait.ASKS, Shape.OTHER)  # fmt: skip
    yield from _rows("getattr(name)", Trait.VIEWS, Shape.OTHER)


def _exported() -> Iterator[Operation]:
    other, moves = Shape.OTHER, _IDENTITY | Trait.MOVES
    yield from _rows("lift_fresh", _IDENTITY | Trait.VIEWS, Shape.SAME)
    yield from _rows("numpy_T mT diagonal(offset, dim1, dim2) broadcast_to(size)",
                     moves | Trait.VIEWS, other)  # fmt: skip
    yield from _rows("repeat_interleave(repeats, dim) index(indices)", moves, other)
    yield from _rows("unsafe_split(split_size, dim)", moves | Trait.SPLITS, other)
    yield from _rows("hstack vstack", moves | Trait.JOINS, other)
    yield from _rows("_assert_tensor_metadata _shape_as_tensor", Trait.ASKS, other)
    yield from _rows("linalg_vector_norm(ord, dim, keepdim)", _NONE, Shape.REDUCED)
    yield from _rows("mm addmm baddbmm tensordot grouped_mm/_grouped_mm", Trait.CONTRACTS, other)
    yield from _rows("conv_transpose1d conv_transpose2d conv_transpose3d convolution bilinear "
                     "embedding", Trait.LAYER, other)  # fmt: skip


OPERATIONS: tuple[Operation, ...] = (*_elementwise(), *_pooling(), *_moves(), *_others())
EXPORTED: tuple[Operation, ...] = tuple(_exported())
"""What exported calls show beside; `operation` is None: no rule follows it in a traced graph."""
_BY_SPELLING = {spelling: row for row in OPERATIONS for spelling in row.spellings}
_BY_NAME = {row.name: row for row in (*OPERATIONS, *EXPORTED)}


def spelled(*names: str) -> frozenset[str]:
    """Return every spelling of operations that are given by their canonical names.

    Raises:
        KeyError: the table has no such row.
    """
    return frozenset(spelling for name in names for spelling in _BY_NAME[name].spellings)


def spelled_where(holds: Callable[[Operation], bool]) -> frozenset[str]:
    """Return every spelling of the operations of which `holds` says so."""
    return spelled(*(name for name, row in _BY_NAME.items() if holds(row)))


_HOMES = ("torch", "_operator", "operator", "builtins")
_GUESTS: Mapping[str, frozenset[str]] = {
    "torchvision": frozenset({"stochastic_depth"}),
    "timm": frozenset({"drop_path"}),
}
"""Functions of other packages that the table knows."""


def operation(node: Node) -> Operation | None:
    """Return the operation that a function or a method computes, None for anything else."""
    return _operation(node.target) if node.op in ("call_method", "call_function") else None


@lru_cache(maxsize=4096)
def _operation(target: Any) -> Operation | None:
    """Return the operation of a function, or of a method by its name: few, and asked for often."""
    row = _BY_SPELLING.get(plain_name(target).removeprefix("special_"))
    if row is None or isinstance(target, str):
        return row
    return row if _is_known(row, target) else None


def _is_known(row: Operation, target: Any) -> bool:
    """Return whether a function with a name of `row` is that of torch, or of a known package."""
    home = getattr(target, "__module__", None) or getattr(
        getattr(target, "__objclass__", None), "__module__", ""
    )
    root = str(home).partition(".")[0]
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        root = "torch" if home == "torch._ops.aten" else ""
    return root in _HOMES or row.name in _GUESTS.get(root, ())


def call_of(captured: Captured, node: Node) -> Call | None:
    """Return the call of a known operation that `node` is, or None."""
    if node.op != "call_module":
        row = operation(node)
        return None if row is None else Call(row, node, None)
    module = captured.module(str(node.target))
    kind = next((base for base in type(module).__mro__ if base in MODULES), None)
    if kind is None or not is_plain(module):
        return None
    return Call(_BY_SPELLING[MODULES[kind]], node, module)


def named(node: Node, *names: str) -> bool:
    """Return whether `node` calls one of these operations, by a function or a method."""
    row = operation(node)
    return row is not None and row.name in names


def has(node: Node, trait: Trait) -> bool:
    """Return whether `node` calls an operation with this trait, by a function or a method."""
    row = operation(node)
    return row is not None and trait in row.traits


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by its position or by its name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
