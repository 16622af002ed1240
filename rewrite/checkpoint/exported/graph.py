"""Rebuild the fx graph of an exported program, node by node, from validated JSON.

    inputs of the graph = parameters, buffers, constants and what the user gives
    node                = operator (by name, from the list), arguments, names of its results

Parameters become attributes that the graph reads; buffers that the program writes are written by
`copy_`, as PyTorch's own unlifting does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch._ops import OpOverload

from rewrite.checkpoint.allowed_functions import find_function
from rewrite.checkpoint.graph_values import identifier
from rewrite.errors import CheckpointError

DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 9: torch.complex32,
    10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
    28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz, 32: torch.float8_e5m2fnuz, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
"""The numbers by which the schema calls element types."""

_LAYOUTS = {1: torch.sparse_coo, 2: torch.sparse_csr, 7: torch.strided}
_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_PLAIN = ("as_int", "as_ints", "as_string", "as_strings", "as_bool", "as_bools", "as_int_lists")


class GraphBuilder:
    """Builds the fx graph of one exported program."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self.graph = torch.fx.Graph()
        self._values: dict[str, torch.fx.Node] = {}
        self._attributes: dict[str, str] = {}
        self._decoders: dict[str, Callable[[Any], Any]] = {
            "as_none": lambda _: None,
            "as_tensor": self._tensor,
            "as_tensors": lambda items: [self._tensor(item) for item in items],
            "as_nested_tensors": lambda rows: [[self._tensor(i) for i in row] for row in rows],
            "as_float": _float,
            "as_floats": lambda items: [_float(item) for item in items],
            "as_float_lists": lambda rows: [[_float(item) for item in row] for row in rows],
            "as_optional_tensor": self._argument,
            "as_optional_tensors": self._arguments,
            "as_scalar_type": lambda number: _known(DTYPES, number, "element type"),
            "as_memory_format": lambda number: _known(_FORMATS, number, "memory format"),
            "as_layout": lambda number: _known(_LAYOUTS, number, "layout"),
            "as_device": _device,
            "as_complex": lambda value: complex(_float(value["real"]), _float(value["imag"])),
            "as_sym_int": self._symbolic,
            "as_sym_float": self._symbolic,
            "as_sym_bool": self._symbolic,
            "as_sym_ints": lambda items: [self._symbolic(item) for item in items],
            "as_sym_floats": lambda items: [self._symbolic(item) for item in items],
            "as_sym_bools": lambda items: [self._symbolic(item) for item in items],
            **dict.fromkeys(_PLAIN, lambda value: value),
        }

    def build(self) -> tuple[torch.fx.Graph, dict[str, str]]:
        """Return the graph, and the kind of each attribute that it reads, by name.

        Raises:
            CheckpointError: something in it cannot be expressed, or is on no list.
        """
        described = self._content["graph"]
        signature = self._content["signature"]
        if len(described["inputs"]) != len(signature["input_specs"]):
            raise CheckpointError("holds a graph with other inputs than its signature")
        for argument, spec in zip(described["inputs"], signature["input_specs"], strict=True):
            self._input(argument, spec)
        for node in described["nodes"]:
            self._node(node)
        self._outputs(described["outputs"], signature["output_specs"])
        return self.graph, self._attributes

    # -- inputs and outputs ----------------------------------------------------------------------

    def _input(self, argument: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
        ((kind, content),) = spec.items()
        names = {
            "parameter": "parameter_name",
            "buffer": "buffer_name",
            "tensor_constant": "tensor_constant_name",
        }
        if kind in names:
            attribute = content[names[kind]]
            is_kept = kind != "buffer" or content["persistent"]
            self._attributes[attribute] = kind if is_kept else "temporary buffer"
            name = _name_of(argument, f"{kind}_{len(self._values)}")
            self._define(name, self.graph.create_node("get_attr", attribute, name=name))
        elif kind in ("user_input", "constant_input"):
            name = content.get("name") or _name_of(argument, f"arg_{len(self._values)}")
            self._define(name, self.graph.placeholder(identifier(name)))
        else:
            raise CheckpointError(f"takes a {kind.replace('_', ' ')}, which no tensor is")

    def _outputs(self, described: Sequence[Any], specs: Sequence[Any]) -> None:
        if len(described) != len(specs):
            raise CheckpointError("holds a graph with other outputs than its signature")
        given = []
        for argument, spec in zip(described, specs, strict=True):
            ((kind, content),) = spec.items()
            value = self._argument(argument)
            if kind in ("user_output", "loss_output"):
                given.append(value)
            elif kind in ("buffer_mutation", "parameter_mutation"):
                written = content.get("buffer_name") or content.get("parameter_name")
                self._write(self._attribute(written), value)
            elif kind == "user_input_mutation":
                self._write(self._named(content["user_input_name"]), value)
            else:
                raise CheckpointError(f"returns a {kind.replace('_', ' ')}")
        self.graph.output(tuple(given))

    def _attribute(self, name: str) -> torch.fx.Node:
        node: torch.fx.Node
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        raise CheckpointError(f"writes {name!r}, which it does not have")

    def _write(self, target: torch.fx.Node, value: Any) -> None:
        self.graph.call_function(torch.ops.aten.copy_.default, (target, value))

    # -- nodes -----------------------------------------------------------------------------------

    def _node(self, node: Mapping[str, Any]) -> None:
        function = find_function(node["target"], ())
        args, kwargs = self._call(function, node["inputs"])
        outputs = node["outputs"]
        results = [_results(output) for output in outputs]
        is_list = len(outputs) == 1 and isinstance(results[0], list)
        name = results[0] if len(outputs) == 1 and not is_list else node.get("name")
        made = self.graph.create_node(
            "call_function", function, args, kwargs,
            name=None if name is None else identifier(name),
        )  # fmt: skip
        if len(outputs) == 1 and isinstance(results[0], str):
            self._define(results[0], made)
            return
        parts: list[Any] = results[0] if is_list else results  # type: ignore[assignment]  # one list, or each result by itself
        for index, part in enumerate(parts):
            if isinstance(part, str):
                item = self.graph.create_node(
                    "call_function", _getitem(), (made, index), {}, name=identifier(part)
                )
                self._define(part, item)

    def _call(
        self, function: Any, inputs: Sequence[Mapping[str, Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional arguments and keywords, as the operator's schema divides them."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        known = function._schema.arguments if isinstance(function, OpOverload) else None
        for given in inputs:
            value = self._argument(given["arg"])
            if known is None:
                args.append(value)
                continue
            place = next((i for i, arg in enumerate(known) if arg.name == given["name"]), None)
            if place is None:
                raise CheckpointError(f"calls {function} with an argument {given['name']!r}")
            if place == len(args) and not known[place].kwarg_only and not kwargs:
                args.append(value)
            else:
                kwargs[identifier(given["name"])] = value
        return tuple(args), kwargs

    def _define(self, name: str, node: torch.fx.Node) -> None:
        if identifier(name) in self._values:
            raise CheckpointError(f"holds a graph that computes {name!r} twice")
        self._values[name] = node

    # -- arguments -------------------------------------------------------------------------------

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        ((kind, value),) = argument.items()
        decode = self._decoders.get(kind)
        if decode is None:
            what = kind.removeprefix("as_").replace("_", " ")
            raise CheckpointError(f"holds a graph with an argument of kind {what!r}")
        return decode(value)

    def _arguments(self, items: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [self._argument(item) for item in items]

    def _tensor(self, value: Mapping[str, Any]) -> torch.fx.Node:
        return self._named(value["name"])

    def _symbolic(self, value: Mapping[str, Any]) -> Any:
        ((kind, content),) = value.items()
        return self._named(content) if kind == "as_name" else content

    def _named(self, name: str) -> torch.fx.Node:
        if name not in self._values:
            raise CheckpointError(f"holds a graph that uses {name!r} before it is computed")
        return self._values[name]


def _results(output: Mapping[str, Any]) -> str | list[str] | None:
    """Return the name, or the names, of what a node makes."""
    ((kind, value),) = output.items()
    if kind == "as_tensor":
        return str(value["name"])
    if kind == "as_tensors":
        return [str(item["name"]) for item in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool") and "as_name" in value:
        return str(value["as_name"])
    if kind == "as_optional_tensors":
        return [str(item["as_tensor"]["name"]) for item in value if "as_tensor" in item]
    if kind == "as_none":
        return None
    raise CheckpointError(f"holds a graph whose node makes a {kind.removeprefix('as_')}")


def _name_of(argument: Mapping[str, Any], otherwise: str) -> str:
    ((_, value),) = argument.items()
    found = value.get("name") or value.get("as_name") if isinstance(value, dict) else None
    return str(found) if found else otherwise


def _getitem() -> Any:
    return find_function("_operator.getitem", ())


def _float(value: Any) -> float:
    return float(str(value).replace("Infinity", "inf")) if isinstance(value, str) else float(value)


def _known(table: Mapping[int, Any], number: int, what: str) -> Any:
    if number not in table:
        raise CheckpointError(f"holds a graph with an {what} of number {number}")
    return table[number]


def _device(value: Mapping[str, Any]) -> torch.device:
    if value["type"] not in ("cpu", "cuda", "meta", "mps", "xpu"):
        raise CheckpointError(f"holds a graph on the device {value['type']!r}")
    index = value.get("index")
    return torch.device(value["type"]) if index is None else torch.device(value["type"], index)
