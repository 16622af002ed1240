"""Serialize the arguments and the signature of a graph as plain data, and read them back.

    node -> {"node": name}      (1, x) -> {"tuple": [1, {"node": "x"}]}      and so on, by kind

fx writes arguments into the source that it generates, so what a file says is held to these few
kinds, and each name in it to be an identifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from rewrite.checkpoint.vetting.sizes import identifier as identifier
from rewrite.errors import CheckpointError

_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def encode(value: Any, node: torch.fx.Node) -> Any:
    """Return an argument as plain data; containers are tagged with their kind.

    Raises:
        CheckpointError: it is of a type that no file holds.
    """
    if isinstance(value, torch.fx.Node):
        return {"node": value.name}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Size):
        return {"size": [encode(item, node) for item in value]}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(item, node) for item in value]}
    if isinstance(value, list):
        return {"list": [encode(item, node) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, node), encode(v, node)] for k, v in value.items()]}
    if isinstance(value, slice | range):
        parts = [encode(part, node) for part in (value.start, value.stop, value.step)]
        return {type(value).__name__: parts}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, _TORCH_CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": None}
    raise CheckpointError(
        f"the graph's node {node.name} has an argument of type {type(value).__qualname__}, "
        "which cannot be written"
    )


def decode(value: Any, nodes: Mapping[str, torch.fx.Node]) -> Any:
    """Return the argument that plain data stands for.

    Raises:
        CheckpointError: the data stand for none.
    """
    if type(value) in _PLAIN:
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise CheckpointError("holds a graph with an argument that is no plain data")
    ((kind, content),) = value.items()
    if kind == "node":
        if content not in nodes:
            raise CheckpointError(f"holds a graph that uses {content!r} before it is computed")
        return nodes[content]
    if kind == "torch":
        found = getattr(torch, identifier(content), None)
        if not isinstance(found, _TORCH_CONSTANTS):
            raise CheckpointError(f"holds a graph with torch.{content} as an argument")
        return found
    if kind == "device":
        return torch.device(str(content))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dict":
        return {_key(decode(k, nodes)): decode(v, nodes) for k, v in content}
    items = [decode(item, nodes) for item in content]
    made = {"tuple": tuple, "list": list, "size": torch.Size}.get(kind)
    if made is not None:
        return made(items)
    if kind == "slice" and len(items) == 3:
        return slice(*items)
    if kind == "range" and len(items) == 3:
        return range(*items)
    raise CheckpointError(f"holds a graph with an argument of kind {kind!r}")


def _key(value: Any) -> Any:
    """Return a key of a dict argument; fx writes it into the source as it is."""
    if type(value) not in (str, int, bool, type(None)):
        raise CheckpointError("holds a graph with a dict argument whose key is no text")
    return value


# -- signatures of exported programs ------------------------------------------------------------


def describe_signature(codegen: CodeGen) -> dict[str, Any] | None:
    """Return the nested inputs and outputs of an exported program's graph, if it has any."""
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise CheckpointError(f"a graph with a {type(codegen).__name__} cannot be written")
    info = codegen.pytree_info
    return {
        "names": list(info.orig_args),
        "inputs": _describe_spec(info.in_spec),
        "outputs": None if info.out_spec is None else _describe_spec(info.out_spec),
    }


def build_signature(signature: Mapping[str, Any]) -> _PyTreeCodeGen:
    """Return the code generator of a described signature."""
    names = [identifier(name) for name in signature["names"]]
    outputs = signature["outputs"]
    return _PyTreeCodeGen(
        _PyTreeInfo(
            names,
            pytree.tree_structure(example(signature["inputs"])),
            None if outputs is None else pytree.tree_structure(example(outputs)),
        )
    )


def _describe_spec(spec: pytree.TreeSpec) -> Any:
    """Return a tree of containers: None for a leaf, else the kind, its keys and its children."""
    if spec.is_leaf():
        return None
    if spec.type not in (tuple, list, dict):
        raise CheckpointError(f"a graph that takes or returns a {spec.type} cannot be written")
    children = [_describe_spec(spec.child(i)) for i in range(spec.num_children)]
    keys = list(spec.context) if spec.type is dict else None
    return [spec.type.__name__, keys, children]


def example(description: Any) -> Any:
    """Return a tree of the described structure, with zeros for leaves."""
    if description is None:
        return 0
    kind, keys, children = description
    examples = [example(child) for child in children]
    if kind == "dict":
        names = [identifier(key) for key in keys]
        return dict(zip(names, examples, strict=True))
    if kind in ("tuple", "list"):
        return tuple(examples) if kind == "tuple" else examples
    raise CheckpointError(f"holds a graph that takes or returns a {kind!r}")
