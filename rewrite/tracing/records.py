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
    """A module that the tracer could not enter: it is one call in the graph.

    Attributes:
        name: its qualified name.
        reason: why it could not be traced, in one line.
        source: "file.py:123", the line of the model's code that stopped the trace, if known.
    """

    name: str
    reason: str
    source: str | None


@dataclass(frozen=True)
class Frame:
    """One invocation of a module's forward: the module's name, and its number in the trace."""

    owner: str
    invocation: int


@dataclass(frozen=True, eq=False)
class Decision:
    """A line that needed a size as a number, or asked for a mode, and may branch on it.

    Attributes:
        owner: the module whose forward was running.
        code, line: the function and its line.
        nodes: the values that the function had at that point, and those it computed since.
        held: the nodes in the value of each local name at that point, none for a number;
            "self.NAME" is a number in an attribute of the module.
        when: in words, the condition under which it may do something else.
    """

    owner: str
    code: CodeType
    line: int
    nodes: list[Node]
    held: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    when: str = BY_SIZE


@dataclass
class Trace:
    """The result of tracing one root.

    Attributes:
        graph: the fx graph.
        frames, lines: per node, the forward that made the call and the line of its code.
        constants: tensors of the graph that no module holds.
        made: those of them that the forward creates or writes to at each call.
        entered: the modules whose forward the trace went through, the root first.
        kept: the values that a forward assigns to attributes, and to which.
        decisions: lines that needed a size as a number, or asked for a mode of torch.
        augmented: the nodes of augmented assignments, `x += y` and its like.
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
