"""Serialize a GraphModule, or a parametrized module, as plain data.

    GraphModule   = its state + a list of nodes (op, name, target, args, kwargs) + its signature
    Parametrized* = its state + its own class; the properties are made again

Python pickles a GraphModule as source code, which no safe loader may run, and cannot pickle a
parametrized module at all. Here the saving side writes nodes as lists, dicts and strings, and the
loading side builds an fx graph from them. fx then generates source from that graph, so each text
that ends up in the source is checked first: names are identifiers, a function is one that
`rewrite.checkpoint.allowed_functions` lists, a method is one that computes on tensors, an argument
is a node or a constant. Nothing that a file says is run as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from rewrite.checkpoint.allowed_functions import METHODS, find_function, name_of_function, readable
from rewrite.checkpoint.graph_values import (
    build_signature,
    decode,
    describe_signature,
    encode,
    identifier,
)
from rewrite.errors import CheckpointError
from rewrite.nn.edited import original_class, with_forward
from rewrite.nn.weight_norm import WeightNorm
from rewrite.weights.weight_norm import complete_weight_norm, is_weight_norm_hook

_MADE_AGAIN = frozenset(
    {
        "_graph",
        "_code",
        "_lineno_map",
        "_prologue_start",
        "_tracer_cls",
        "_tracer_extras",
        "_replace_hooks",
        "_create_node_hooks",
        "_erase_node_hooks",
        "_deepcopy_hooks",
        "_in_spec",
        "_out_spec",
        "meta",
        "shape_env",
    }
)
"""What a GraphModule derives from its graph; never taken from a file."""


_PATH = re.compile(r"[\w-]+(\.[\w-]+)*")


_ANNOTATIONS: dict[str, type] = {kind.__name__: kind for kind in (Tensor, bool, int, float, str)}
"""Annotations that a graph keeps; they are text in the source, so the others are left out."""


class SavedModule:
    """What stands for a module in a file; `__setstate__` turns it into the module, in place.

    Staying the same object keeps every alias of the module an alias.
    """

    def __init__(self, trust: Sequence[str] = ()) -> None:
        # Under a name that no state holds, until the state arrives.
        self.__dict__["trust"] = tuple(trust)


class SavedGraph(SavedModule):
    """A GraphModule in a file."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Become the GraphModule that `state` describes."""
        trust = self.__dict__.pop("trust")
        held = _dict(state, "state")
        if forged := sorted(_MADE_AGAIN.intersection(held)):
            raise CheckpointError(f"holds a graph with a ready-made {forged[0]}")
        graph = build_graph(_dict(state, "graph"), trust)
        module = torch.fx.GraphModule(nn.Module(), torch.fx.Graph(), identifier(state["class"]))
        self.__dict__.update(module.__dict__)
        self.__dict__.update(held)
        self.__class__ = type(module)  # type: ignore[assignment]  # a GraphModule becomes the class that it was
        _check_targets(self, graph)  # type: ignore[arg-type]  # its graph is an fx.Graph, which nn.Module does not say
        self.graph = graph
        graph.lint()


class SavedForward(SavedModule):
    """A module of a class of its own, whose forward is a graph, in a file."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Become the module that `state` describes."""
        trust = self.__dict__.pop("trust")
        base = state["class"]
        if not (isinstance(base, type) and issubclass(base, nn.Module)):
            raise CheckpointError("holds a module with an edited forward of no class")
        graph = build_graph(_dict(state, "graph"), trust)
        self.__dict__.update(_dict(state, "state"))
        self.__class__ = with_forward(base, graph)  # type: ignore[assignment]  # a GraphModule becomes the class that it was
        _check_targets(self, graph)  # type: ignore[arg-type]  # its graph is an fx.Graph, which nn.Module does not say


class SavedParametrized(SavedModule):
    """A module with `torch.nn.utils.parametrize` parametrizations in a file."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Become the parametrized module that `state` describes."""
        self.__dict__.pop("trust")
        base = state["class"]
        if not (isinstance(base, type) and issubclass(base, nn.Module)):
            raise CheckpointError("holds a parametrized module of no class")
        held = _dict(state, "state")
        module: Any = self
        module.__class__ = base
        module.__setstate__(held)
        parametrize._inject_new_class(module)
        for name, steps in held["_modules"]["parametrizations"]._modules.items():
            parametrize._inject_property(module, identifier(name))
            if isinstance(steps[0], _WeightNorm):
                _add_hook_of_weight_norm(module, name)
            elif isinstance(steps[0], WeightNorm):
                complete_weight_norm(module, name)


def describe_graph_module(module: torch.fx.GraphModule) -> dict[str, Any]:
    """Return a GraphModule as the state of a `SavedGraph`, or raise CheckpointError."""
    base = next(kind for kind in type(module).__mro__ if "<locals>" not in kind.__qualname__)
    if not base.__module__.startswith("torch."):
        raise CheckpointError(
            f"{base.__qualname__}, a GraphModule class of its own, cannot be written; "
            "save its state dict instead"
        )
    held = {key: value for key, value in vars(module).items() if key not in _MADE_AGAIN}
    return {
        "class": type(module).__name__,
        "graph": describe_graph(module.graph),
        "state": held,
    }


def describe_forward(module: nn.Module) -> dict[str, Any]:
    """Return a module with an edited forward as the state of a `SavedForward`."""
    return {
        "class": original_class(type(module)),
        "graph": describe_graph(module.graph),  # type: ignore[arg-type]  # its graph is an fx.Graph, which nn.Module does not say
        "state": dict(vars(module)),
    }


def describe_parametrized(module: nn.Module) -> dict[str, Any]:
    """Return a parametrized module as the state of a `SavedParametrized`."""
    held = dict(vars(module))
    hooks = held["_load_state_dict_pre_hooks"]
    held["_load_state_dict_pre_hooks"] = type(hooks)(
        (key, hook)
        for key, hook in hooks.items()
        if not (is_hook_of_weight_norm(hook) or is_weight_norm_hook(hook))
    )
    return {"class": type(module).__mro__[1], "state": held}


def is_hook_of_weight_norm(hook: Any) -> bool:
    """Say whether a hook is the local function that lets old state dicts be loaded."""
    function = getattr(hook, "hook", hook)
    name = f"{parametrizations.__name__}.weight_norm.<locals>._weight_norm_compat_hook"
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}" == name


def _add_hook_of_weight_norm(module: nn.Module, name: str) -> None:
    """Give a module the hook that `torch.nn.utils.parametrizations.weight_norm` gives it."""
    donor = nn.Module()
    donor.register_parameter(name, nn.Parameter(torch.ones(1, 1)))
    parametrizations.weight_norm(donor, name)
    for key, hook in donor._load_state_dict_pre_hooks.items():
        module._load_state_dict_pre_hooks[key] = hook


def describe_graph(graph: torch.fx.Graph) -> dict[str, Any]:
    """Return a graph as lists, dicts, strings and numbers."""
    nodes = [
        {
            "op": node.op,
            "name": node.name,
            "target": _name_of_target(node),
            "args": [encode(arg, node) for arg in node.args],
            "kwargs": {key: encode(value, node) for key, value in node.kwargs.items()},
            "type": next((k for k, kind in _ANNOTATIONS.items() if kind is node.type), None),
        }
        for node in graph.nodes
    ]
    return {"nodes": nodes, "signature": describe_signature(graph._codegen)}


def build_graph(description: Mapping[str, Any], trust: Sequence[str]) -> torch.fx.Graph:
    """Return the graph of a description; raise CheckpointError for anything out of the ordinary."""
    graph = torch.fx.Graph()
    nodes: dict[str, torch.fx.Node] = {}
    for entry in description["nodes"]:
        op, name = entry["op"], identifier(entry["name"])
        args = tuple(decode(value, nodes) for value in entry["args"])
        kwargs = {identifier(key): decode(value, nodes) for key, value in entry["kwargs"].items()}
        target = _check_node(op, entry["target"], args, kwargs, trust)
        annotation = _ANNOTATIONS.get(entry["type"])
        nodes[name] = graph.create_node(op, target, args, kwargs, name, annotation)
    signature = description["signature"]
    if signature is not None:
        graph.set_codegen(build_signature(signature))
    return graph


# -- targets ------------------------------------------------------------------------------------


def _name_of_target(node: torch.fx.Node) -> str:
    """Return the text that stands for a node's target."""
    if node.op == "call_function":
        return name_of_function(node.target, node)
    return str(node.target)


def _check_node(
    op: Any, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], trust: Sequence[str]
) -> Any:
    """Return the target of a node of a file, or raise CheckpointError."""
    if not isinstance(target, str):
        raise CheckpointError(f"holds a graph with a {type(target).__name__} as target")
    if op == "placeholder":
        stars = "*" * min(2, len(target) - len(target.lstrip("*")))
        return stars + identifier(target.removeprefix(stars))
    if op == "output":
        return "output"
    if op in ("call_module", "get_attr"):
        if _PATH.fullmatch(target) is None:
            raise CheckpointError(
                f"holds a graph that reads {target!r}, which is no attribute path"
            )
        return target
    if op == "call_method":
        if target not in METHODS:
            raise CheckpointError(f"holds a graph that calls the method {target!r}")
        return target
    if op != "call_function":
        raise CheckpointError(f"holds a graph with a node {op!r}")
    if target == "builtins.getattr" and not (
        len(args) == 2 and not kwargs and isinstance(args[1], str) and readable(args[1])
    ):
        raise CheckpointError(f"holds a graph that reads the attribute {args[1:]!r}")
    if target.startswith("builtins.") and kwargs:
        # max(key=...) and its like call what they are given.
        raise CheckpointError(f"holds a graph that calls {target} with keywords")
    return find_function(target, trust)


def _check_targets(module: nn.Module, graph: torch.fx.Graph) -> None:
    """Raise CheckpointError unless each path of the graph is a module or a tensor of `module`."""
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        if node.op == "get_attr" and node.target == "training":
            continue
        *path, last = str(node.target).split(".")
        owner: Any = module
        for part in path:
            owner = _child(owner, part)
        found = _child(owner, last)
        if found is None and node.op == "get_attr" and isinstance(owner, nn.Module):
            found = None if hasattr(type(owner), last) else _tensor(vars(owner), last)
        wanted = (nn.Module,) if node.op == "call_module" else (nn.Module, Tensor)
        if not isinstance(found, wanted):
            raise CheckpointError(f"holds a graph that reads {node.target}, which is not there")


def _tensor(held: dict[str, Any], name: str) -> Any:
    """Return what an attribute of a module that holds `held` reads."""
    for values in (held, held["_parameters"], held["_buffers"]):
        if name in values:
            return values[name]
    return None


def _child(owner: Any, name: str) -> Any:
    """Return a registered child of a module, unless a method or attribute hides it.

    The source that fx generates reads `self.name`, where the class comes first: a child that is
    called "save_pretrained" would be a call of that method.
    """
    if not isinstance(owner, nn.Module) or name in vars(owner) or hasattr(type(owner), name):
        return None
    return owner._modules.get(name)


def _dict(state: Any, key: str) -> dict[str, Any]:
    """Return a dict of a saved module's state."""
    value = state.get(key) if isinstance(state, dict) else None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"holds a saved module whose {key} is damaged")
    return value


for _kind in (SavedForward, SavedGraph, SavedParametrized):
    _kind.__module__ = __package__
