"""Propagate shapes while a graph is built, by running every call on meta tensors.

Each node is computed once, on the meta device, as it is traced; a module that cannot be traced is
run as it is on the stand-in. Where that fails, too (control flow on values), nodes have no shape.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F

from rewrite.runtime.inputs import Inputs
from rewrite.runtime.tree import Tree
from rewrite.tracing.dry_run import Call, DryRun, on_meta
from rewrite.tracing.source_lines import reason_of

# Fake and meta tensors decompose these, which took most of the time of a MobileNet.
_KEEP_SHAPE: frozenset[Any] = frozenset(
    {
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm,
        nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm,
        nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh,
        nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.Identity, nn.Dropout, nn.Dropout2d,
        F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.relu, F.relu6,
        F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.hardswish, F.hardsigmoid, F.dropout,
    }
)  # fmt: skip

_COMBINE: frozenset[Any] = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul}
    | {torch.add, torch.sub, torch.mul, torch.div}
)
"""Of two tensors: their common shape, where both are of one floating-point type."""

_ATTRIBUTES = frozenset(
    {"shape", "ndim", "dtype", "T", "mT", "H", "data", "real", "imag", "is_nested"}
)

_DEVICES = frozenset({"is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta"})

_OF_DEVICES: frozenset[Any] = frozenset({getattr, operator.eq, operator.ne})


class Shapes:
    """Computes the meta tensor, or the Python value, of each node of a trace.

    Attributes:
        error: why something could not be run.
    """

    def __init__(self, model: Tree, copied: Tree, inputs: Inputs) -> None:
        self.error: str | None = None
        self._copied = copied
        self._placed: dict[str, Any] = {}
        self._dry = DryRun(model, copied, (inputs.args, dict(inputs.kwargs)))

    @property
    def running(self) -> bool:
        """Whether a dry run is in progress, so that calls are not to be traced."""
        return self._dry.running

    def given(self, root: nn.Module, assumed: dict[str, Any]) -> dict[str, Any]:
        """Return the model's non-tensor optional arguments, at their given or default values.

        An optional argument that is given as a tensor is an input instead.
        """
        found = dict(assumed)
        args, kwargs = self._dry.inputs[""]
        try:
            bound = inspect.signature(type(root).forward).bind_partial(root, *args, **kwargs)
        except TypeError:
            return found
        for key in assumed.keys() & bound.arguments.keys():
            value = bound.arguments[key]
            if value is None or isinstance(value, bool | int | float | str):
                found[key] = value
            else:
                del found[key]
        return found

    def enter(self, name: str, root: nn.Module) -> None:
        """Begin a trace of `root`: its placeholders get the inputs recorded for it, if any."""
        self._placed = {}
        if name in self._dry.inputs:
            args, kwargs = self._dry.inputs[name]
            forward = inspect.signature(type(root).forward)
            try:
                bound = forward.bind_partial(root, *args, **kwargs).arguments
            except TypeError as error:
                self.error = self.error or str(error)
                return
            rest: dict[str, Any] = {
                p.name: () if p.kind is p.VAR_POSITIONAL else {}
                for p in forward.parameters.values()
                if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            }
            self._placed = rest | bound

    def attach(self, node: Node, constants: Mapping[str, Tensor], opaque: bool) -> None:
        """Set `meta["val"]` of a new node, and `meta["fixed"]` if it depends on no input."""
        if node.op == "output":
            return
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            if name in self._placed:
                node.meta["val"] = self._placed[name]
            return
        if node.op == "get_attr":
            node.meta["val"] = self._attribute(str(node.target), constants)
            node.meta["fixed"] = True
            return
        sources = node.all_input_nodes
        if any("val" not in source.meta for source in sources):
            return
        if sources and all("fixed" in source.meta for source in sources):
            node.meta["fixed"] = True
        call = (
            map_arg(node.args, _value_of), map_arg(node.kwargs, _value_of),
        )  # fmt: skip
        try:
            value = self._compute(node, call, opaque)
        except Exception as error:  # noqa: BLE001 - a forward may do anything without numbers
            self.error = self.error or f"{node}: {reason_of(error)[0]}"
            return
        if value is not NotImplemented:
            node.meta["val"] = map_aggregate(value, lambda item: item)

    def observe(self, name: str) -> None:
        """Run a root that cannot be traced, and record the inputs of the modules it calls."""
        if name in self._dry.inputs:
            try:
                self._run(name, self._dry.inputs[name], opaque=True)
            except Exception as error:  # noqa: BLE001 - likewise
                self.error = self.error or reason_of(error)[0]

    # -- computing ----------------------------------------------------------------------------

    def _attribute(self, target: str, constants: Mapping[str, Tensor]) -> Any:
        if target in constants:
            return on_meta(constants[target])
        owner, _, attr = target.rpartition(".")
        module = self._copied.get(owner)
        for held in (module._parameters, module._buffers, vars(module)):
            if attr in held:  # not by getattr, which is the tracer's
                return on_meta(held[attr])
        return None

    def _compute(self, node: Node, call: Call, opaque: bool) -> Any:
        args, kwargs = call
        if node.op == "call_module":
            return self._run(str(node.target), call, opaque)
        if node.target in _KEEP_SHAPE:
            return args[0] if args else kwargs["input"]
        if node.target in _COMBINE and (wider := _wider(args, kwargs)) is not None:
            return wider
        if node.target is torch.cat and (whole := _joined(*args, **kwargs)) is not None:
            return whole
        if node.op == "call_method":
            function: Callable[..., Any] = _method(str(node.target))
        else:
            assert callable(node.target)
            function = node.target
            if function is getattr and isinstance(args[0], Tensor):
                if args[1] == "device":
                    return self._dry.device
                if args[1] in _DEVICES:
                    return getattr(torch.empty(0, device=self._dry.device), args[1])
                if args[1] not in _ATTRIBUTES:
                    return NotImplemented
            if function in _OF_DEVICES and isinstance(args[0], torch.device):
                return function(*args)  # not on meta, as a new tensor would be
        return self._dry.run_function(function, call)

    def _run(self, name: str, call: Call, opaque: bool) -> Any:
        module = self._copied.get(name)
        hooked = module._forward_hooks or module._forward_pre_hooks
        if type(module) in _KEEP_SHAPE and call[0] and not hooked:
            return call[0][0]
        if not opaque and len(call[0]) == 1 and not call[1] and not hooked:
            made = _pooled(module, call[0][0])
            made = _convolved(module, call[0][0]) if made is None else made
            if made is not None:
                return made
        return self._dry.run_module(name, call, opaque)


def _wider(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the operand that has the shape and dtype of a sum of two; None if neither has."""
    if kwargs or len(args) != 2 or not all(type(value) is Tensor for value in args):
        return None
    one, other = args
    if one.dtype != other.dtype or not one.is_floating_point() or one.device != other.device:
        return None
    if one.shape == other.shape:
        return cast(Tensor, one)
    if one.dim() != other.dim():
        return None
    pairs = list(zip(one.shape, other.shape, strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    sizes = tuple(b if a == 1 else a for a, b in pairs)
    return next((value for value in args if value.shape == sizes), None)


def _joined(tensors: Any = (), dim: Any = 0, **rest: Any) -> Tensor | None:
    """Return what a concatenation of contiguous tensors makes; None if it has to be run."""
    if rest or not tensors or type(dim) is not int:
        return None
    first = tensors[0]
    if not all(type(part) is Tensor and part.is_contiguous() for part in tensors):
        return None
    if any(
        (p.dtype, p.device, p.dim()) != (first.dtype, first.device, first.dim()) for p in tensors
    ):
        return None
    if not -first.dim() <= dim < first.dim():
        return None
    place = dim % first.dim()
    beside = {(*part.shape[:place], *part.shape[place + 1 :]) for part in tensors}
    if len(beside) > 1:
        return None
    length = sum(part.shape[place] for part in tensors)
    return cast(Tensor, first.new_empty((*first.shape[:place], length, *first.shape[place + 1 :])))


def _pooled(module: nn.Module, x: Any) -> Tensor | None:
    """Return the result of adaptive average pooling of images; None if it has to be run."""
    if type(module) is not nn.AdaptiveAvgPool2d or type(x) is not Tensor or x.dim() != 4:
        return None
    size: Any = module.output_size
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if not all(isinstance(side, int) for side in sizes):
        return None
    return x.new_empty((*x.shape[:2], *sizes))


def _convolved(module: nn.Module, x: Any) -> Tensor | None:
    """Return the result of a plain convolution of images; None if it has to be run."""
    if type(module) is not nn.Conv2d or isinstance(module.padding, str):
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if module.padding_mode != "zeros" or weight is None or type(x) is not Tensor or x.dim() != 4:
        return None
    channels, inside, *taps = weight.shape
    fits = x.shape[1] == inside * module.groups and channels % module.groups == 0
    if not fits or not x.is_contiguous() or any(t.dtype != x.dtype for t in module.parameters()):
        return None
    if bias is not None and bias.shape != (channels,):
        return None
    geometry = zip(x.shape[2:], taps, module.stride, module.padding, module.dilation, strict=True)
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    return x.new_empty((x.shape[0], channels, *sides)) if min(sides) > 0 else None


def _method(name: str) -> Callable[..., Any]:
    def call(subject: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(subject, name)(*args, **kwargs)

    return call


def _value_of(node: Node) -> Any:
    return node.meta["val"]
