"""The one tracer: symbolic tracing that turns what it cannot trace into an opaque call.

Differences from `torch.fx.Tracer`, each for a reason:

1. A standard layer is a leaf by its *forward*, not by its package: `torch.nn` layers and
   subclasses that inherit their forward unchanged; a subclass with a forward of its own is entered.
2. Targets are qualified names of the whole model, whichever submodule is the root of the region.
3. A submodule whose forward raises becomes one `call_module` node; the nodes of the attempt are
   erased as far as nothing else reads them. Tracing goes on.
4. A module with forward hooks is a boundary: a hook may read or change what passes.
5. A split by sizes has as many parts as sizes, and can be iterated over.
6. Nothing of the model changes: constants are kept beside the graph, attributes that a forward
   assigns while proxies flow through it are put back, and so is the state of the random generator.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx._symbolic_trace import _new_patcher
from torch.nn.utils.parametrize import is_parametrized

from rewrite.runtime.tree import Tree

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


_TORCH_PREFIXES = ("torch.nn.", "torch.ao.nn.")


_LAYER_METHODS = ("forward", "_conv_forward", "_check_input_dim")


@dataclass(frozen=True)
class Opaque:
    """A module that is one call to the tracer.

    Attributes:
        name: its qualified name.
        reason: what stopped the tracer, in one line.
        source: "file.py:123", the line of the model's code where that happened, if known.
    """

    name: str
    reason: str
    source: str | None


@dataclass(frozen=True)
class Frame:
    """One invocation of a module's forward: its name, and which invocation of the trace it is."""

    owner: str
    invocation: int


@dataclass
class Trace:
    """What one traced root yields.

    Attributes:
        graph: the fx graph.
        frames, lines: per node, the forward that made the call and the line of its code.
        constants: tensors of the graph that no module holds.
        entered: the modules whose forward the trace went through, the root first.
        kept: the values that a forward keeps on its module, and where.
    """

    graph: Graph
    frames: dict[Node, Frame] = field(default_factory=dict)
    lines: dict[Node, tuple[CodeType, int]] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    entered: list[str] = field(default_factory=list)
    kept: dict[Node, str] = field(default_factory=dict)


def is_leaf(module: nn.Module) -> bool:
    """Return whether `module` is a standard layer: torch.nn's own, or one that only inherits."""
    kind = type(module)
    if isinstance(module, _CONTAINERS):
        return False
    if is_parametrized(module):
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


def hook_reasons(module: nn.Module) -> tuple[str, ...]:
    """Return why a call of `module` is more than its forward: hooks, a forward set by hand."""
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


class RegionTracer(Tracer):
    """Trace one root (the model, or a submodule below an opaque one) without ever giving up.

    Use it inside `tracing(tree)`, which protects the model from its own side effects.

    Args:
        tree: the names of the whole model.
        tensors: the owner and attribute of each parameter and buffer, by id.
        opaque: the modules known to be opaque; the tracer adds those that it finds.
    """

    proxy_buffer_attributes = True

    def __init__(self, tree: Tree, tensors: dict[int, str], opaque: dict[str, Opaque]) -> None:
        super().__init__()
        self.tree = tree
        self.tensors = tensors
        self.opaque = opaque
        self.shallow = False
        self._frames: list[Frame] = []
        self._invocations: dict[str, int] = {}
        self._dead: list[Node] = []
        self._before: dict[str, dict[str, Any]] = {}
        self._trace: Trace

    def run(self, root: nn.Module, arguments: dict[str, Any]) -> Trace:
        """Trace `root`; `arguments` are the values of parameters that are not inputs.

        Raises:
            Exception: whatever the forward of `root` itself raised.
        """
        name = self.tree.name(root)
        self._frames = [Frame(name, 0)]
        self._invocations = {name: 1}
        self._dead = []
        self._before = {name: dict(vars(root))}
        self._trace = Trace(Graph(), entered=[name])
        try:
            self.trace(root, concrete_args=arguments or None)
        finally:
            # A value that a forward caches on its module belongs to this graph, not to the next.
            for entered, before in self._before.items():
                held = vars(self.tree.get(entered))
                for key, value in held.items():
                    where = f"{entered}.{key}" if entered else key
                    kept = (p.node for p in _proxies(value) if p.node.graph is self.graph)
                    self._trace.kept.update(dict.fromkeys(kept, where))
                _put_back(held, before)
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

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a leaf, enter anything else, and fall back to one opaque call if that raises."""
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name) or name in self.opaque:
            return self.create_proxy("call_module", name, args, kwargs)
        if hooks := hook_reasons(m):
            self.opaque[name] = Opaque(name, hooks[0], None)
            return self.create_proxy("call_module", name, args, kwargs)
        last = self._last_node()
        depth, entered = len(self._frames), len(self._trace.entered)
        invocation = self._invocations.get(name, 0)
        self._invocations[name] = invocation + 1
        self._frames.append(Frame(name, invocation))
        self._trace.entered.append(name)
        self._before.setdefault(name, dict(vars(m)))
        try:
            return forward(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a forward under proxies may raise anything
            self.opaque[name] = Opaque(name, *reason_of(error))
            self._dead.extend(_nodes_after(last))
            del self._trace.entered[entered:]
        finally:
            del self._frames[depth:]
        return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """Return a proxy for a registered parameter or buffer, found by identity."""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self.tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Iterate over what `split` returns if it is given the sizes: one part each."""
        parts = _parts(obj.node)
        return super().iter(obj) if parts is None else map(cast(Any, obj).__getitem__, range(parts))

    def create_arg(self, a: Any) -> Any:
        """Turn a tensor into a `get_attr` node without storing anything on the model."""
        if isinstance(a, torch.Tensor):
            name = self.tensors.get(id(a))
            if name is None:
                name = f"_constant{len(self._trace.constants)}"
                self._trace.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Create a node and note which forward made it, and on which line."""
        node = super().create_node(*args, **kwargs)
        self._trace.frames[node] = self._frames[-1]
        if node.op not in ("placeholder", "output", "get_attr"):
            line = _user_line()
            if line is not None:
                self._trace.lines[node] = line
        return node

    # -- erasing ------------------------------------------------------------------------------

    def _last_node(self) -> Node:
        return self.graph._root._prev

    def _erase_dead(self) -> None:
        """Erase what failed attempts left, except what living code reads (cached attributes)."""
        for node in reversed(self._dead):
            if not node.users and not node._erased:
                self.graph.erase_node(node)


def _proxies(value: Any, depth: int = 4) -> Iterator[Proxy]:
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _proxies(item, depth - 1)


def _parts(node: Node) -> int | None:
    """Return how many parts a split by sizes has; by one size, or a chunk, it is the input's."""
    if node.target not in (torch.split, "split", torch.split_with_sizes, "split_with_sizes"):
        return None
    names = ("split_size_or_sections", "split_size", "split_sizes")
    given = [*node.args[1:2], *(node.kwargs[name] for name in names if name in node.kwargs)]
    return len(given[0]) if given and isinstance(given[0], list | tuple) else None


def _nodes_after(last: Node) -> list[Node]:
    found = []
    node = last._next
    while node.op != "root":
        found.append(node)
        node = node._next
    return found


def reason_of(error: BaseException) -> tuple[str, str | None]:
    """Return the first sentence of `error`, and the line of the model's code that raised it."""
    text = str(error).strip().splitlines()
    first = text[0].split(". ")[0] if text else ""
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_machinery(frame.filename)
    ]
    source = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    return reason, source


_MACHINERY = (str(Path(torch.__file__).parent) + os.sep, __file__)


def _is_machinery(filename: str) -> bool:
    return filename.startswith(_MACHINERY)


def _user_line() -> tuple[CodeType, int] | None:
    frame = sys._getframe(2)
    while frame is not None:
        if not _is_machinery(frame.f_code.co_filename):
            return frame.f_code, frame.f_lineno
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


@contextlib.contextmanager
def tracing(tree: Tree) -> Iterator[None]:
    """Prepare a model for any number of traces, and leave it as it was."""
    with _without_side_effects(tree), _without_dimension_checks():
        yield


@contextlib.contextmanager
def _without_dimension_checks() -> Iterator[None]:
    """Let `super().forward(x)` of a norm subclass be traced: its check compares proxies."""

    def skip(self: nn.Module, input: Any) -> None:
        return None

    with _new_patcher() as patcher:
        from torch.nn.modules import batchnorm, instancenorm

        for module in (batchnorm, instancenorm):
            for kind in vars(module).values():
                if isinstance(kind, type) and "_check_input_dim" in vars(kind):
                    patcher.patch_method(kind, "_check_input_dim", skip, deduplicate=False)
        yield


@contextlib.contextmanager
def _without_side_effects(tree: Tree) -> Iterator[None]:
    """Put back the attributes that a forward assigns and the random state that it advances."""
    before = [(vars(module), dict(vars(module))) for _, module in tree.modules()]
    contents = [
        (value, value.copy())
        for held, _ in before
        for key, value in held.items()
        if isinstance(value, list | dict) and not key.endswith("_hooks")
    ]
    random = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(random)
        for value, copied in contents:
            if len(value) != len(copied) or _differs(value, copied):
                value.clear()
                value.extend(copied) if isinstance(value, list) else value.update(copied)
        for held, copied in before:
            _put_back(held, copied)


def _put_back(held: dict[str, Any], copied: dict[str, Any]) -> None:
    if len(held) != len(copied) or _differs(held, copied):
        held.clear()
        held.update(copied)


def _differs(value: Any, copied: Any) -> bool:
    """Return whether two containers of one length hold other objects, or in another order."""
    if isinstance(value, dict):
        same = all(map(operator.is_, value.values(), copied.values()))
        return not (same and all(map(operator.is_, value, copied)))
    return not all(map(operator.is_, value, copied))
