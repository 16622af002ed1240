"""Judge loops whose length the file says: how often they run, and what they carry along.

    steps(graph) = sum over its nodes of   1 + rounds(node) * steps(body)
    carried(k)   = sizes that the body makes of carried(k - 1),   carried(0) = what is given

A loop without a last round and with a condition that stays true never ends. Where the length comes
out of constants, so do the steps, and sizes are followed from one round to the next: a value that
is put together with itself is a terabyte after 40 of them. A loop that data ends is for the limits
of a run (`rewrite.onnx.runtime`). Free axes of inputs count as 1, so nothing is counted too high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rewrite.errors import VerificationError
from rewrite.onnx.vetting.constants import MOST_ELEMENTS, NO_LARGER, SIZES, value_of
from rewrite.onnx.vetting.nodes import all_nodes, label
from rewrite.onnx.vetting.work import (
    check_multiplications,
    infer,
    multiplications,
    nbytes_of,
    shape_of,
)

MOST_STEPS, MOST_STEPS_A_NODE = 10**6, 10**4
"""Loops may run so many nodes, or each node of the file so often on average: about a second."""

MOST_CARRIED_BYTES, MOST_CARRIED_TIMES = 256 << 20, 8
"""What a loop carries and collects may take so much, or so many times what the file holds."""

FOLLOWED = 64
"""Rounds whose sizes are followed; what still grows then is taken to grow on as it did last."""

MOST_INFERRED = 50_000
"""Nodes whose sizes are inferred for all loops together; what lies beyond is not followed."""


Types = Mapping[str, onnx.TypeProto]
Constants = Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    """What is known after running a graph once: types and constants by name, and what it took."""

    types: Types
    constants: Constants
    steps: float = 0
    multiplications: float = 0

    def then(
        self,
        types: Types,
        constants: Constants | None = None,
        steps: float = 0,
        multiplications: float = 0,
    ) -> _Run:
        """Return this with more that is known and was taken."""
        kept = {name: value for name, value in self.constants.items() if name not in types}
        return _Run(
            {**self.types, **types},
            {**kept, **(constants or {})},
            self.steps + steps,
            self.multiplications + multiplications,
        )

    def begun(self, types: Types, constants: Constants) -> _Run:
        """Return where a body begins that sees this, with values of its own."""
        inside = self.then(types, constants)
        return _Run(inside.types, inside.constants)


def check_loops(place: Path, model: onnx.ModelProto, nbytes: int) -> None:
    """Raise VerificationError where a loop never ends, runs too often or carries too much.

    Args:
        place: the file, for messages.
        model: the graph, with its functions inlined.
        nbytes: what the file and its data hold.

    Raises:
        VerificationError: a loop never ends, or is out of proportion to the file.
    """
    if any(node.op_type in ("Loop", "Scan") for node in all_nodes(model.graph)):
        types = {value.name: _with_ones(value.type) for value in model.graph.input}
        _Following(place, model, nbytes).graph(model.graph, _Run(types, {}))


def _with_ones(kind: onnx.TypeProto) -> onnx.TypeProto:
    """Return a type whose free axes are 1."""
    result = onnx.TypeProto()
    result.CopyFrom(kind)
    for dim in result.tensor_type.shape.dim if kind.HasField("tensor_type") else ():
        if dim.dim_value <= 0:
            dim.dim_value = 1
    return result


class _Following:
    """Follows a graph node by node, and each loop round by round."""

    def __init__(self, place: Path, model: onnx.ModelProto, nbytes: int) -> None:
        self.place, self.model, self.nbytes = place, model, nbytes
        self.inferred = 0
        self.lengths = _lengths(model.graph)
        self.held = sum(1 for _ in all_nodes(model.graph))
        self.most_steps = max(MOST_STEPS, MOST_STEPS_A_NODE * self.held)
        self.most_bytes = MOST_CARRIED_BYTES + MOST_CARRIED_TIMES * nbytes

    def graph(self, graph: Any, run: _Run) -> _Run:
        """Return what is known after a graph that begins with what `run` knows."""
        stored = {tensor.name: _type_of(tensor) for tensor in graph.initializer}
        run = run.then(stored, dict(_small(graph)))
        plain: list[Any] = []
        for node in graph.node:
            if node.op_type not in ("Loop", "Scan", "If"):
                plain.append(node)
                continue
            run, plain = self._plain(plain, run), []
            if node.op_type == "If":
                run = self._branches(node, run)
            else:
                run = self._loop(node, run) if node.op_type == "Loop" else self._scan(node, run)
                self._check_work(node, run)
        return self._plain(plain, run)

    def _plain(self, nodes: list[Any], run: _Run) -> _Run:
        """Follow nodes without graphs of their own."""
        self.inferred += len(nodes)
        if not nodes or self.inferred > MOST_INFERRED:
            return run.then({}, steps=len(nodes))
        constants = _evaluated(self.model, nodes, run.constants, self.lengths)
        types = _inferred(self.model, nodes, run)
        shapes = {name: shape_of(kind) for name, kind in {**run.types, **types}.items()}
        count = sum(multiplications(node, shapes) for node in nodes)
        return run.then(types, constants, len(nodes), count)

    def _branches(self, node: Any, run: _Run) -> _Run:
        """Follow both branches, or the one that a constant chooses; the dearer one counts."""
        names = {"then_branch", "else_branch"}
        if (chosen := run.constants.get(node.input[0])) is not None:
            names = {"then_branch" if np.any(chosen) else "else_branch"}
        graphs = [a.g for a in node.attribute if a.name in names]
        ends = [self.graph(graph, run.begun({}, {})) for graph in graphs]
        if not ends:
            return run
        steps = 1 + max(end.steps for end in ends)
        types = _outputs(node.output, graphs[0].output, ends[0])
        count = max(end.multiplications for end in ends)
        return run.then(types, steps=steps, multiplications=count)

    # -- loops -------------------------------------------------------------------------------------

    def _loop(self, node: Any, run: _Run) -> _Run:
        body = next(a.g for a in node.attribute if a.name == "body")
        going = _constant(run, node.input[1] if len(node.input) > 1 else "", True)
        if going is not None and not going:
            return run.then({})
        most = _constant(run, node.input[0] if node.input else "", math.inf)
        own = [value.name for value in body.input]
        given = [run.types.get(name, onnx.TypeProto()) for name in node.input[2:]]
        # Of rounds that go on: the condition is what the body leaves, and never false.
        begins = {own[1]: np.array(True)} if going and len(own) > 1 else {}
        types: dict[str, Any] = dict(zip(own[2:], given, strict=False))
        end = self._round(node, body, run.begun(types, begins), 1)
        left = end.constants.get(body.output[0].name) if len(body.output) else None
        stays = bool(going) and left is not None and bool(np.all(left))
        if stays and most == math.inf:
            raise VerificationError(
                f"{self.place}: {label(node)}: the loop never ends: no number of rounds stops it, "
                "and its condition stays true; export it again with one of them"
            )
        rounds = max(float(most), 0) if stays and most is not None else None
        if rounds is not None:
            self._check_rounds(node, end, rounds)
            end = self._grown(node, body, run, end, (rounds, begins))
        count = 1 if rounds is None else rounds
        carried = _outputs(node.output, body.output[1 : 1 + len(given)], end)
        return run.then(carried, {}, 1 + count * end.steps, count * end.multiplications)

    def _grown(
        self, node: Any, body: Any, run: _Run, end: _Run, length: tuple[float, Constants]
    ) -> _Run:
        """Follow what a loop carries until it stays as large as it is."""
        rounds, begins = length
        own, left = [v.name for v in body.input][2:], [v.name for v in body.output][1:]
        before, grown = 0, 0
        for number in range(2, int(min(rounds, FOLLOWED)) + 1):
            types = {a: end.types.get(b, onnx.TypeProto()) for a, b in zip(own, left, strict=False)}
            size = sum(nbytes_of(kind) for kind in types.values())
            grown, before = size - before, size
            self._check_carried(node, size, number - 1)
            following = self._round(node, body, run.begun(types, begins), number)
            if all(_same(end.types.get(n), following.types.get(n)) for n in left[: len(own)]):
                grown = 0
                break
            end = following
        self._check_carried(node, before + max(grown, 0) * max(rounds - FOLLOWED, 0), rounds)
        collected = sum(nbytes_of(end.types.get(n, onnx.TypeProto())) for n in left[len(own) :])
        self._check_carried(node, collected * rounds, rounds)
        return end

    def _round(self, node: Any, body: Any, begin: _Run, number: int) -> _Run:
        end = self.graph(body, begin)
        size = sum(nbytes_of(end.types.get(v.name, onnx.TypeProto())) for v in body.output)
        self._check_carried(node, size, number)
        return end

    def _scan(self, node: Any, run: _Run) -> _Run:
        body = next(a.g for a in node.attribute if a.name == "body")
        attributes = {a.name: a for a in node.attribute}
        count = int(attributes["num_scan_inputs"].i)
        states = len(node.input) - count
        axes = [n for a in node.attribute if a.name == "scan_input_axes" for n in a.ints]
        axes = axes or [0] * count
        types, rounds = {}, 1
        for place, (name, own) in enumerate(zip(node.input, body.input, strict=False)):
            kind = run.types.get(name, onnx.TypeProto())
            if place >= states:
                kind, length = _without_axis(kind, int(axes[place - states]))
                rounds = max(rounds, length)
            types[own.name] = kind
        end = self._round(node, body, run.begun(types, {}), 1)
        collected = [end.types.get(v.name, onnx.TypeProto()) for v in body.output[states:]]
        self._check_carried(node, sum(map(nbytes_of, collected)) * rounds, rounds)
        made = _outputs(node.output, body.output[:states], end)
        return run.then(made, {}, 1 + rounds * end.steps, rounds * end.multiplications)

    # -- limits ------------------------------------------------------------------------------------

    def _check_work(self, node: Any, run: _Run) -> None:
        if run.steps > self.most_steps:
            raise VerificationError(
                f"{self.place}: {label(node)}: the file holds {self.held} nodes, and its loops run "
                f"at least {run.steps:.3g} of them, at most {self.most_steps:.3g} are taken; "
                "export it with fewer rounds"
            )
        check_multiplications(self.place, node, run.multiplications, self.nbytes)

    def _check_rounds(self, node: Any, end: _Run, rounds: float) -> None:
        self._check_work(node, end.then({}, {}, rounds * end.steps, rounds * end.multiplications))

    def _check_carried(self, node: Any, size: float, rounds: float) -> None:
        if size > self.most_bytes:
            raise VerificationError(
                f"{self.place}: {label(node)}: after {rounds:.0f} rounds it holds at least "
                f"{size / 2**20:.0f} MiB, at most {self.most_bytes / 2**20:.0f} MiB are taken for "
                f"a file of {self.nbytes} bytes; export it with fewer rounds"
            )


# -- single nodes ----------------------------------------------------------------------------------


def _type_of(tensor: Any) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))


def _small(graph: Any) -> Any:
    for tensor in graph.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not external and math.prod(tensor.dims) <= MOST_ELEMENTS:
            yield tensor.name, numpy_helper.to_array(tensor)


def _constant(run: _Run, name: str, absent: Any) -> Any:
    """Return the one number of a constant, `absent` of no name, None where it is not known."""
    if not name:
        return absent
    value = run.constants.get(name)
    return value.reshape(-1)[0] if value is not None and value.size == 1 else None


def _lengths(graph: Any) -> set[str]:
    """Return the values that sizes, numbers of rounds and conditions are computed of."""
    found: set[str] = set()
    for node in reversed(list(all_nodes(graph))):
        if node.op_type in ("Loop", "If"):
            found.update(node.input[:2])
            found.update(b.g.output[0].name for b in node.attribute if len(b.g.output))
        found.update(node.input[p] for p in SIZES.get(node.op_type, ()) if p < len(node.input))
        if found.intersection(node.output):
            found.update(node.input)
    return found


def _evaluated(
    model: onnx.ModelProto, nodes: list[Any], known: Constants, wanted: set[str]
) -> dict[str, Any]:
    """Return the constants there are after nodes: those known, and those wanted of them."""
    values = dict(known)
    for node in nodes:
        if node.op_type not in NO_LARGER or not wanted.intersection(node.output):
            continue
        given = [values.get(name) for name in node.input]
        if node.op_type == "Or" and any(v is not None and v.all() for v in given):
            made: list[Any] = [np.array(True)]
        elif node.op_type == "Identity" and given and given[0] is not None:
            made = given
        elif node.op_type == "Constant" or (given and all(v is not None for v in given)):
            made = value_of(model, node, values)
        else:
            continue
        found = zip(node.output, made, strict=False)
        values.update({name: value for name, value in found if value.size <= MOST_ELEMENTS})
    return values


def _inferred(model: onnx.ModelProto, nodes: list[Any], run: _Run) -> dict[str, onnx.TypeProto]:
    """Return the types of what nodes make, as onnx infers them."""
    made = dict.fromkeys(name for node in nodes for name in node.output if name)
    read = dict.fromkeys(n for node in nodes for n in node.input if n and n not in made)
    stored = [numpy_helper.from_array(run.constants[n], n) for n in read if n in run.constants]
    inputs = [
        helper.make_value_info(name, run.types.get(name, onnx.TypeProto()))
        for name in read
        if name not in run.constants
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in made]
    graph = helper.make_graph(nodes, "nodes", inputs, outputs, stored)
    found = infer(helper.make_model(graph, opset_imports=list(model.opset_import)))
    values = () if found is None else (*found.graph.value_info, *found.graph.output)
    return {value.name: value.type for value in values}


def _outputs(names: Any, inner: Any, end: _Run) -> dict[str, onnx.TypeProto]:
    """Return the types of a node's outputs: those of what its body leaves."""
    return {
        name: end.types[value.name]
        for name, value in zip(names, inner, strict=False)
        if value.name in end.types
    }


def _without_axis(kind: onnx.TypeProto, axis: int) -> tuple[onnx.TypeProto, int]:
    """Return the type of one slice of a value, and how many there are; 1 where that is open."""
    dims = list(kind.tensor_type.shape.dim)
    if not -len(dims) <= axis < len(dims):
        return onnx.TypeProto(), 1
    length = dims.pop(axis).dim_value
    result = onnx.TypeProto()
    result.tensor_type.elem_type = kind.tensor_type.elem_type
    result.tensor_type.shape.dim.extend(dims)
    return result, max(length, 1)


def _same(one: Any, other: Any) -> bool:
    return one is not None and other is not None and nbytes_of(one) == nbytes_of(other)
