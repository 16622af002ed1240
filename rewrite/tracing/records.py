"""The result of a trace: graph, source line and owner of each call, and calls left opaque."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import CodeType

import torch
from torch.fx import Graph, Node

BY_SIZE = "for an input of another size"
"""What nearly every decision is about."""


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


@dataclass(frozen=True, eq=False)
class Decision:
    """A place where code needed a size as a number, or asked for a mode: it may do something else.

    Attributes:
        owner: the module whose forward was running.
        code, line: the function and its line.
        nodes: the values at hand there, and those made by that function since.
        held: what the local names stand for there: the nodes in a value, none in a number;
            "self.NAME" stands for a number of the module.
        when: for what it may do something else, in words.
    """

    owner: str
    code: CodeType
    line: int
    nodes: list[Node]
    held: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    when: str = BY_SIZE


@dataclass
class Trace:
    """What one traced root yields.

    Attributes:
        graph: the fx graph.
        frames, lines: per node, the forward that made the call and the line of its code.
        constants: tensors of the graph that no module holds.
        made: those of them that no attribute holds, or that were written: made at each call.
        entered: the modules whose forward the trace went through, the root first.
        kept: the values that a forward keeps on its module, and where.
        decisions: where a size was needed as a number, or a mode of torch asked for.
        augmented: the nodes that `x += y` and its like made.
    """

    graph: Graph
    frames: dict[Node, Frame] = field(default_factory=dict)
    lines: dict[Node, tuple[CodeType, int]] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    made: frozenset[str] = frozenset()
    entered: list[str] = field(default_factory=list)
    kept: dict[Node, str] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    augmented: set[Node] = field(default_factory=set)
