"""The shape of every value, as the graph is made: tensors without numbers run through each call.

Each node is computed once, on the meta device, when it is traced; what cannot be traced is run as
it is on the stand-in, and the inputs of what it calls are noted on the way. A call that the meta
device does not know is computed with fake tensors instead. What cannot be run on either (control
flow on values) leaves its nodes without a shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from rewrite.runtime.inputs import Inputs
from rewrite.runtime.stand_in import Attributes, stand_in
from rewrite.runtime.tree import Tree, join
from rewrite.tracing.source_lines import reason_of

_Call = tuple[tuple[Any, ...], dict[str, Any]]

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

_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "T", "mT", "H", "data", "real", "imag"})


class Shapes:
    """Computes what each node of a trace is worth, without its numbers.

    Attributes:
        inputs: by module, the inputs of its first call, as far as one was seen.
        running: whether a forward is being run here, rather than traced.
        error: why something could not be run.
    """

    def __init__(self, model: Tree, copied: Tree, inputs: Inputs) -> None:
        self.inputs: dict[str, _Call] = {}
        self.running = False
        self.error: str | None = None
        self._model = model
        self._copied = copied
        self._device = next((t.device for t in model.model.parameters()), torch.device("cpu"))
        self._placed: dict[str, Any] = {}
        self._fakes: dict[str, Tree] = {}
        self.inputs[""] = (_meta(inputs.args), _meta(dict(inputs.kwargs)))

    def given(self, root: nn.Module, assumed: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model that are no inputs: optional ones, as they are given.

        A tensor that is given for one makes it an input.
        """
        found = dict(assumed)
        args, kwargs = self.inputs[""]
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
        """Begin a trace of `root`: its placeholders are the inputs that were seen, if any."""
        self._placed = {}
        if name in self.inputs:
            args, kwargs = self.inputs[name]
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
        """Compute `meta["val"]` of a new node; `meta["fixed"]` says that no input changes it."""
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
        """Run a root that cannot be traced, and note the inputs of all that it calls."""
        if name in self.inputs:
            try:
                self._run(name, self.inputs[name], opaque=True)
            except Exception as error:  # noqa: BLE001 - likewise
                self.error = self.error or reason_of(error)[0]

    # -- computing ----------------------------------------------------------------------------

    def _attribute(self, target: str, constants: Mapping[str, Tensor]) -> Any:
        if target in constants:
            return _meta(constants[target])
        owner, _, attr = target.rpartition(".")
        module = self._copied.get(owner)
        for held in (module._parameters, module._buffers, vars(module)):
            if attr in held:  # not by getattr, which is the tracer's
                return _meta(held[attr])
        return None

    def _compute(self, node: Node, call: _Call, opaque: bool) -> Any:
        args, kwargs = call
        if node.op == "call_module":
            return self._run(str(node.target), call, opaque)
        if node.target in _KEEP_SHAPE:
            return args[0] if args else kwargs["input"]
        if node.op == "call_method":
            function: Callable[..., Any] = _method(str(node.target))
        else:
            assert callable(node.target)
            function = node.target
            if function is getattr and isinstance(args[0], Tensor):
                if args[1] == "device":
                    return self._device
                if args[1] not in _ATTRIBUTES:
                    return NotImplemented
        return self._either(function, lambda mode: function, call)

    def _run(self, name: str, call: _Call, opaque: bool) -> Any:
        module = self._copied.get(name)
        if type(module) in _KEEP_SHAPE and call[0] and not module._forward_hooks:
            return call[0][0]
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(f"{name} is compiled and is not run")
        return self._either(
            self._watched(name, self._copied, opaque),
            lambda mode: self._watched(name, self._fake(name, mode), opaque, inside=name),
            call,
        )

    def _either(
        self, meta: Callable[..., Any], fake: Callable[[Any], Callable[..., Any]], call: _Call
    ) -> Any:
        """Call on the meta device, or with fake tensors where it does not know the operation."""
        args, kwargs = tree_map(_on_meta, call)
        try:
            with self._computing(), torch.device("meta"):
                return meta(*args, **kwargs)
        except Exception as error:
            if "meta tensors" in str(error):  # it asks for a number, which a fake has not either
                raise
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def faked(value: Any) -> Any:
            meta = isinstance(value, Tensor) and value.is_meta
            return FakeTensor(mode, value, self._device) if meta else value

        with self._computing(), mode:
            args, kwargs = tree_map(faked, call)
            return _meta(fake(mode)(*args, **kwargs))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        before = self.running
        self.running = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.running = before

    def _watched(self, name: str, tree: Tree, opaque: bool, inside: str = "") -> Callable[..., Any]:
        """Return a call of a module that leaves it as it was, and notes what it calls."""
        module = tree.get("" if inside else name)
        if not opaque:
            return module

        def run(*args: Any, **kwargs: Any) -> Any:
            below = [m for m in module.modules() if m is not module and m in tree]
            before = Attributes(module.modules())
            handles = [
                m.register_forward_pre_hook(
                    self._note(join(inside, tree.name(m))), with_kwargs=True
                )
                for m in below
                if not isinstance(m, torch.jit.ScriptModule)
            ]
            try:
                return module(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
                before.put_back()

        return run

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.inputs.setdefault(name, (_meta(args), _meta(kwargs)))

        return hook

    def _fake(self, name: str, mode: Any) -> Tree:
        return Tree(stand_in(Tree(self._model.get(name)), mode.from_tensor, mode.from_tensor))


def _method(name: str) -> Callable[..., Any]:
    def call(subject: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(subject, name)(*args, **kwargs)

    return call


def _value_of(node: Node) -> Any:
    return node.meta["val"]


def _meta(value: Any) -> Any:
    """Return `value` with every tensor in it on the meta device."""
    return tree_map(_tensor_on_meta, value)


def _tensor_on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor) or (type(value) in (Tensor, nn.Parameter) and value.is_meta):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _on_meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else _tensor_on_meta(value)
