"""The symbolic tracer; a call that it cannot trace becomes one opaque node.

Differences from `torch.fx.Tracer`, each for a reason:

1. A standard layer is a leaf by its *forward*, not by its package: `torch.nn` layers and
   subclasses that inherit their forward unchanged; a subclass with a forward of its own is entered.
2. Targets are qualified names of the whole model, whichever submodule is the root of the region.
3. A submodule whose forward raises becomes one `call_module` node; the nodes of the attempt are
   erased as far as nothing else reads them. Tracing goes on.
4. A module with forward hooks is not entered: a hook may read or change inputs and outputs.
5. A split by a list of sizes can be iterated over: it has as many parts as sizes.
6. The model does not change: a stand-in is traced, constants are stored beside the graph, and the
   state of the random generators is restored.
7. With example inputs each value has a shape, and branches and loops on sizes are followed; the
   line is recorded as a `Decision`, with the values that it may affect.
8. A slice of a Sequential, which no attribute holds, is entered: its items belong to the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.nn.utils.parametrize import is_parametrized

from rewrite.runtime.stand_in import Attributes
from rewrite.runtime.tree import Tree
from rewrite.tracing.code.functions_run import FunctionsRun, unnoted
from rewrite.tracing.patches import modes_noted
from rewrite.tracing.proxies import AUGMENTED, nodes_of
from rewrite.tracing.records import Frame, Opaque, Trace
from rewrite.tracing.source_lines import reason_of, user_frame
from rewrite.tracing.value_tracer import ValueTracer

if TYPE_CHECKING:
    from rewrite.tracing.shapes import Shapes

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


_NUMBERS_AND_NAMES = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})


_COMPOSED = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Layers of torch.nn that are made of layers: their forward is read like any other."""


_TORCH_PREFIXES = ("torch.nn.", "torch.ao.nn.")


_LAYER_METHODS = ("forward", "_conv_forward", "_check_input_dim")


def is_leaf(module: nn.Module) -> bool:
    """Return whether `module` is a standard layer: its forward is the one of torch.nn."""
    kind = type(module)
    if isinstance(module, _CONTAINERS + _COMPOSED):
        return False
    if has_parametrizations(module):
        kind = kind.__mro__[1]
    if kind.__module__.startswith("torch.nn.parallel."):
        return False
    if kind.__module__.startswith(_TORCH_PREFIXES):
        return True
    if "forward" in vars(module):
        return False
    base = next((b for b in kind.__mro__ if b.__module__.startswith(_TORCH_PREFIXES)), nn.Module)
    if base is nn.Module or issubclass(base, _CONTAINERS):
        return False
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in _LAYER_METHODS)


def has_parametrizations(module: nn.Module) -> bool:
    """Return whether `torch.nn.utils.parametrize` computes a tensor of `module`.

    Looked up in the dict of children: `hasattr` is slow on modules that have none, as most.
    """
    return "parametrizations" in module._modules and is_parametrized(module)


def hook_reasons(module: nn.Module) -> tuple[str, ...]:
    """Return why a call of `module` runs more than its class's forward: hooks, an override."""
    reasons = []
    if module._forward_pre_hooks and not _is_old_weight_norm(module):
        reasons.append("has a forward pre-hook")
    if module._forward_hooks:
        reasons.append("has a forward hook")
    if module._backward_hooks or module._backward_pre_hooks:
        reasons.append("has a backward hook")
    if "forward" in vars(module) and not module.__module__.startswith("torch.fx"):
        reasons.append("has a forward that was set on the instance")
    return tuple(reasons)


def _is_old_weight_norm(module: nn.Module) -> bool:
    """Return whether the only pre-hooks are those of `torch.nn.utils.weight_norm` and its like."""
    hooks = module._forward_pre_hooks.values()
    return all(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)


class RegionTracer(ValueTracer):
    """Traces one root: the model, or a submodule below an opaque one.

    To be used inside `tracing()`, on a stand-in of the model: a forward may write to attributes.

    Args:
        tree: the stand-in, under the names of the whole model.
        tensors: the owner and attribute of each parameter and buffer, by id.
        opaque: the modules known to be opaque; the tracer adds those that it finds.
        shapes: computes the shape of each value, if there are example inputs.
        ran: takes note of the functions that run, if it is given.

    Attributes:
        moved: modules that a forward has assigned to another place so far.
        altered: whether a forward has changed any attribute, or the items of one.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        tree: Tree,
        tensors: dict[int, str],
        opaque: dict[str, Opaque],
        shapes: Shapes | None = None,
        ran: FunctionsRun | None = None,
    ) -> None:
        super().__init__(shapes, ran)
        self.tree = tree
        self.tensors = tensors
        self.opaque = opaque
        self.shallow = False
        self._invocations: dict[str, int] = {}
        self._dead: list[Node] = []
        self._before = Attributes(())
        self.moved: set[nn.Module] = set()
        self.altered = False

    def run(self, root: nn.Module, arguments: dict[str, Any]) -> Trace:
        """Trace `root`; `arguments` are the values of parameters that are not inputs.

        Raises:
            Exception: whatever the forward of `root` itself raised.
        """
        name = self.tree.name(root)
        self._frames = [Frame(name, 0)]
        self._invocations = {name: 1}
        self._dead = []
        self._before = Attributes([root])
        self._deciding = {}
        self._trace = Trace(Graph(), entered=[name])
        if self.shapes is not None:
            self.shapes.enter(name, root)
        try:
            with modes_noted(self.decide):
                self.trace(root, concrete_args=arguments or None)
        finally:
            # A value that a forward caches on its module belongs to this graph, not to the next.
            for entered in self._trace.entered:
                for key, value in vars(self.tree.get(entered)).items():
                    if not isinstance(value, Proxy | dict | list | tuple) or not _filled(value):
                        continue
                    where = f"{entered}.{key}" if entered else key
                    kept = (node for node in nodes_of(value) if node.graph is self.graph)
                    self._trace.kept.update(dict.fromkeys(kept, where))
            kept_tensors = self._before.unchanged()
            self._trace.made = frozenset(
                name
                for name, tensor in self._trace.constants.items()
                if id(tensor) not in kept_tensors
            )
            self._before.put_back()
            self.moved |= self._before.moved
            self.altered |= self._before.altered
            self._deciding = {}
        self._trace.graph = self.graph
        self._erase_dead()
        return self._trace

    # -- what fx asks -------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` is one call in the graph."""
        return self.shallow or is_leaf(m)

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the module's qualified name in the whole model."""
        if mod not in self.tree:
            raise NameError(f"calls a {type(mod).__name__} that no attribute of the model holds")
        return self.tree.name(mod)

    @unnoted
    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a leaf, or enter a module; one whose forward raises becomes one opaque call."""
        if self._computes() or _is_slice(self.tree, m):
            with self._noting():
                return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name) or name in self.opaque:
            return self.create_proxy("call_module", name, args, kwargs)
        if hooks := hook_reasons(m):
            self.opaque[name] = Opaque(name, hooks[0], None)
            return self.create_proxy("call_module", name, args, kwargs)
        last = self.graph._root._prev
        depth, entered = len(self._frames), len(self._trace.entered)
        invocation = self._invocations.get(name, 0)
        self._invocations[name] = invocation + 1
        self._frames.append(Frame(name, invocation))
        self._trace.entered.append(name)
        self._before.add(m)
        try:
            with self._noting():
                return forward(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
            self.opaque[name] = Opaque(name, *reason_of(error))
            self._dead.extend(_nodes_after(last))
            self._before.put_back([self.tree.get(n) for n in self._trace.entered[entered:]])
            del self._trace.entered[entered:]
        finally:
            del self._frames[depth:]
        return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """Return a proxy for a registered parameter or buffer, found by identity."""
        if not isinstance(attr_val, torch.Tensor) or self._computes():
            return attr_val
        name = self.tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _computes(self) -> bool:
        return self.shapes is not None and self.shapes.running

    def create_arg(self, a: Any) -> Any:
        """Turn a tensor into a `get_attr` node without storing anything on the model.

        The commonest types come first, for speed: fx's own method tests a dozen rare ones first.
        """
        if isinstance(a, Proxy):
            return a.node
        kind = type(a)
        if kind in _NUMBERS_AND_NAMES:
            return a
        if kind is tuple or kind is list:
            return kind([self.create_arg(item) for item in a])
        if kind is dict and not a:
            return {}
        if isinstance(a, torch.Tensor):
            name = self.tensors.get(id(a))
            if name is None:
                name = f"_constant{len(self._trace.constants)}"
                self._trace.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)

    @unnoted
    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **names: Any
    ) -> Node:
        """Create a node, and record the forward and the line that made the call."""
        plain = AUGMENTED.get(target) if kind == "call_method" else None
        kind, target = ("call_function", plain) if plain else (kind, target)
        node = super().create_node(kind, target, args, kwargs, *rest, **names)
        if plain is not None:
            self._trace.augmented.add(node)
        self._trace.frames[node] = self._frames[-1]
        if not torch.is_grad_enabled():
            node.meta["no_grad"] = True
        if node.op not in ("placeholder", "output", "get_attr"):
            frame = user_frame()
            if frame is not None:
                self._trace.lines[node] = (frame.f_code, frame.f_lineno)
        if self.shapes is not None:
            opaque = node.target in self.opaque
            with self._noting() if opaque else contextlib.nullcontext():
                self.shapes.attach(node, self._trace.constants, opaque)
        if self._deciding:
            self._note_decided(node)
        return node

    # -- erasing ------------------------------------------------------------------------------

    def _erase_dead(self) -> None:
        """Erase nodes of failed attempts, unless other nodes read them (cached attributes)."""
        for node in reversed(self._dead):
            if not node.users and not node._erased:
                self.graph.erase_node(node)


def _is_slice(tree: Tree, module: nn.Module) -> bool:
    """Return whether `module` is a temporary slice of a Sequential: `self.layers[:-1]`."""
    if module in tree or type(module).forward is not nn.Sequential.forward:
        return False
    return all(child in tree or _is_slice(tree, child) for child in module.children())


def _filled(value: Any) -> bool:
    """Return whether a value may contain proxies: it is one, or a container that is not empty."""
    return isinstance(value, Proxy) or bool(len(value))


def _nodes_after(last: Node) -> list[Node]:
    found = []
    node = last._next
    while node.op != "root":
        found.append(node)
        node = node._next
    return found
