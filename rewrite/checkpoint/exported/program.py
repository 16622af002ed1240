"""Open a `.pt2` exported program: rebuilt from its JSON and the raw bytes of its tensors.

    archive = models/NAME.json               the graph, by PyTorch's schema (`exported_schema`)
            + data/weights, data/constants   tensors as raw bytes, sizes and types in a JSON
            + data/sample_inputs             not needed; what is in it must be tensors

`torch.export.load` is not called: it unpickles weights and sample inputs, imports the modules that
a signature names, parses symbolic sizes with `sympify` (which evaluates its text), runs guards
as source and loads compiled libraries. Guards check inputs, and are no part of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import nn
from torch._export.serde import schema
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from rewrite.checkpoint.archive import Archive, opened
from rewrite.checkpoint.exported.graph import DTYPES, GraphBuilder
from rewrite.checkpoint.exported.schema import parse_json
from rewrite.checkpoint.graph_values import example, identifier
from rewrite.checkpoint.pickles.tensors import view
from rewrite.checkpoint.pickles.unpickle import DAMAGED
from rewrite.checkpoint.vetting.exported import vet_exported
from rewrite.errors import CheckpointError, one_line

_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
_CONTAINERS = {"builtins.tuple": "tuple", "builtins.list": "list", "builtins.dict": "dict"}


def load_exported(path: Path, map_location: str | torch.device) -> torch.fx.GraphModule:
    """Return the module of an exported program, or raise CheckpointError."""
    with opened(path) as stream:
        try:
            return _build(Archive(stream)).to(map_location)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except DAMAGED as error:
            raise CheckpointError(
                f"{path}: is no readable exported program ({one_line(error)})"
            ) from error


def _build(archive: Archive) -> torch.fx.GraphModule:
    program = parse_json(archive.read(vet_exported(archive)), schema.ExportedProgram)
    if program["schema_version"]["major"] != schema.SCHEMA_VERSION[0]:
        raise CheckpointError(
            f"has version {program['schema_version']['major']} of PyTorch's format; "
            f"this PyTorch reads {schema.SCHEMA_VERSION[0]}"
        )
    content = program["graph_module"]
    graph, attributes = GraphBuilder(content).build()
    graph.set_codegen(_signature(content, graph))
    module = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    _register(module, _Payload(archive), attributes)
    module.graph = graph
    graph.lint()
    return module.eval()


class _Payload:
    """The tensors of an exported program by their names."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._entries: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._parameters: dict[tuple[str, str], nn.Parameter] = {}
        for name in sorted(archive.names):
            folder, _, last = name.rpartition("/")
            if not last.endswith("_config.json") or not folder.startswith("data/"):
                continue
            for key, entry in parse_json(archive.read(name), schema.PayloadConfig)[
                "config"
            ].items():
                self._entries[key] = (f"{folder}/{entry['path_name']}", entry["tensor_meta"])

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the file."""
        return list(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor; those of one member share their bytes.

        Raises:
            CheckpointError: there is none of that name, or of a layout or type of its own.
        """
        if name not in self._entries:
            raise CheckpointError(f"has no tensor {name!r}")
        member, meta = self._entries[name]
        if meta["dtype"] not in DTYPES or meta["layout"] != schema.Layout.Strided:
            raise CheckpointError(f"holds {name} in a layout or type of its own")
        if member not in self._storages:
            self._storages[member] = self._archive.storage(member, 0)
        size, stride = ([_number(item) for item in meta[key]] for key in ("sizes", "strides"))
        offset = _number(meta["storage_offset"])
        return view(self._storages[member], DTYPES[meta["dtype"]], offset, size, stride)

    def parameter(self, name: str) -> nn.Parameter:
        """Return a tensor as a parameter, the same one for the same bytes."""
        tensor = self.tensor(name)
        member, meta = self._entries[name]
        key = (member, json.dumps(meta, sort_keys=True))
        if key not in self._parameters:
            wanted = meta["requires_grad"] and tensor.is_floating_point()
            self._parameters[key] = nn.Parameter(tensor, requires_grad=wanted)
        return self._parameters[key]


def _number(size: Mapping[str, Any]) -> int:
    if "as_int" not in size:
        raise CheckpointError("holds a tensor whose size is a symbol")
    return int(size["as_int"])


def _register(module: nn.Module, payload: _Payload, attributes: Mapping[str, str]) -> None:
    """Put each tensor where its name says, in modules that hold nothing else."""
    order = [name for name in payload.names() if name in attributes]
    for name in (*order, *(name for name in attributes if name not in order)):
        kind = attributes[name]
        if _KEY.fullmatch(name) is None:
            raise CheckpointError(f"holds the name {name!r}")
        owner: nn.Module = module
        *path, last = name.split(".")
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                _check_free(owner, part, name)
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        _check_free(owner, last, name)
        if kind == "parameter":
            owner.register_parameter(last, payload.parameter(name))
        else:
            owner.register_buffer(last, payload.tensor(name), persistent=kind == "buffer")


def _check_free(owner: nn.Module, part: str, name: str) -> None:
    if hasattr(owner, part):
        raise CheckpointError(f"holds the name {name!r}, which stands for something else")


def _signature(content: Mapping[str, Any], graph: torch.fx.Graph) -> _PyTreeCodeGen:
    """Return the code generator for the nested inputs and outputs of a program."""
    calls = [entry for entry in content["module_call_graph"] if entry["fqn"] == ""]
    if len(calls) != 1 or calls[0].get("signature") is None:
        raise CheckpointError("holds a program without a signature")
    signature = calls[0]["signature"]
    inputs, outputs = (_structure(signature[key]) for key in ("in_spec", "out_spec"))
    given = sum(node.op == "placeholder" for node in graph.nodes)
    if inputs.num_leaves != given or inputs.type is not tuple or inputs.num_children != 2:
        raise CheckpointError("holds a program with other inputs than its signature")
    positional, keywords = inputs.child(0), inputs.child(1)
    names = signature.get("forward_arg_names")
    if names is None:
        names = [f"arg_{i}" for i in range(positional.num_children)] + list(keywords.context or ())
    checked = [identifier(name) for name in names]
    if len(set(checked)) != positional.num_children + keywords.num_children:
        raise CheckpointError("holds a program with other names than inputs")
    return _PyTreeCodeGen(_PyTreeInfo(checked, inputs, outputs))


def _structure(text: str) -> pytree.TreeSpec:
    try:
        version, spec = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError("holds a signature that cannot be read") from error
    if version != 1:
        raise CheckpointError(f"holds a signature of version {version!r}")
    return pytree.tree_structure(example(_described(spec)))


def _described(spec: Any, depth: int = 0) -> Any:
    """Return one level of a signature as `graph_format` describes it, and what is below it."""
    if (
        not isinstance(spec, dict)
        or set(spec) != {"type", "context", "children_spec"}
        or depth > 60
    ):
        raise CheckpointError("holds a signature that cannot be read")
    if spec["type"] is None:
        return None
    if spec["type"] not in _CONTAINERS:
        raise CheckpointError(f"takes or returns a {str(spec['type'])[:80]}")
    keys = None
    if spec["type"] == "builtins.dict":
        keys = json.loads(spec["context"])
        if not isinstance(keys, list) or len(keys) != len(spec["children_spec"]):
            raise CheckpointError("takes or returns a dict without keys")
    children = [_described(child, depth + 1) for child in spec["children_spec"]]
    return [_CONTAINERS[spec["type"]], keys, children]
