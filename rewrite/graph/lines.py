"""Decide which calls in a model's forwards can be edited; nothing is changed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from rewrite.errors import PassError
from rewrite.graph.forward_graph import Forward, line_key, open_forward

if TYPE_CHECKING:
    from rewrite.graph.captured import Captured


class Lines:
    """The forwards of a captured model, by their lines.

    Args:
        captured: the model.
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._forwards: dict[str, Forward | str] = {}

    def refusal(self, node: Node, line: bool = False) -> str | None:
        """Return why the line that made `node` cannot be edited, or None. Changes nothing.

        A layer can be replaced whatever its line says; `line` asks for the line all the same.
        """
        owner = self.captured.owner(node)
        if node.op == "call_module" and not line and not self.in_graph_module(node):
            return None
        forward = self._open(owner)
        if isinstance(forward, str):
            return forward
        return None if self._line(forward, node) is not None else _elsewhere(owner, forward)

    def line(self, node: Node) -> Node | str:
        """Return the line of the owner's own graph that made `node`, or why there is none.

        In that graph the owner's children are single calls, and targets are relative to the owner.
        """
        owner = self.captured.owner(node)
        forward = self._open(owner)
        if isinstance(forward, str):
            return forward
        return self._line(forward, node) or _elsewhere(owner, forward)

    def in_graph_module(self, node: Node) -> bool:
        """Return whether the forward that made `node` is a graph already."""
        return isinstance(self.captured.module(self.captured.owner(node)), GraphModule)

    def open_line(self, node: Node) -> tuple[Forward, Node]:
        """Return the forward that made `node`, open for editing, and its line there.

        Raises:
            PassError: the line cannot be edited.
        """
        owner = self.captured.owner(node)
        forward = self._open(owner)
        if isinstance(forward, str):
            raise PassError(f"{owner}: {forward}")
        line = self._line(forward, node)
        if line is None:
            raise PassError(f"{owner}: {_elsewhere(owner, forward)}")
        forward.edited = True
        return forward, line

    def _line(self, forward: Forward, node: Node) -> Node | None:
        """Return the node of the owner's own graph that made `node`, by its order among equals."""
        region = self.captured.region_of(node)
        frame = region.frames[node]
        key = line_key(node, frame.owner)
        made = [other for other in region.graph.nodes if region.frames[other] == frame]
        if forward.fixed and not _holds(forward, frame.owner, made):
            return None  # this call was given another value for an argument that is tested
        equals = [other for other in made if line_key(other, frame.owner) == key]
        lines = forward.lines.get(key, [])
        return lines[equals.index(node)] if len(lines) == len(equals) else None

    def _open(self, owner: str) -> Forward | str:
        """Return the owner's forward open for editing, or why it cannot be."""
        if owner not in self._forwards:
            self._forwards[owner] = self._fitting(owner)
        return self._forwards[owner]

    def _fitting(self, owner: str) -> Forward | str:
        """Return a forward as its first call ran it: a tested argument may have been given there.

        An argument that is None where it is left out is taken to be there if the lines say so.
        """
        module = self.captured.module(owner)
        opened = open_forward(self.captured, owner, module)
        if isinstance(opened, str) or not opened.fixed:
            return opened
        for region in self.captured.regions:
            frame = next((f for f in region.frames.values() if f.owner == owner), None)
            if frame is None:
                continue
            made = [node for node in region.graph.nodes if region.frames[node] == frame]
            if _holds(opened, owner, made):
                return opened
            for name in opened.fixed:
                other = open_forward(self.captured, owner, module, given=name)
                if isinstance(other, Forward) and _holds(other, owner, made):
                    return other
        return opened

    def take_edited(self) -> list[Forward]:
        """Return the forwards that were edited, and forget all that are open."""
        opened = [f for f in self._forwards.values() if isinstance(f, Forward) and f.edited]
        self._forwards.clear()
        return opened


def _holds(forward: Forward, owner: str, made: list[Node]) -> bool:
    """Return whether a forward has a line for each call that one invocation of it made.

    Two calls of one operation need two lines: `x + mask` may be the second sum of a forward.
    """
    calls = Counter(line_key(node, owner) for node in made if node.op.startswith("call_"))
    return all(len(forward.lines.get(key, ())) >= count for key, count in calls.items())


def _elsewhere(owner: str, forward: Forward) -> str:
    where = owner or "the model"
    if forward.fixed:
        names = ", ".join(forward.fixed)
        return f"is a line of the forward of {where}, which tests its argument {names}"
    return f"is a line of the forward of {where}, which runs differently at different calls"
