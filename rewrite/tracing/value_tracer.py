"""Answer number, length and item queries on proxies whose value is known while tracing.

With example inputs each node has a meta tensor, so branches and loops on sizes can be followed. An
input of another size may take another branch: the line that asked is recorded as a `Decision`, with
the values that its function has at that point and those that it computes afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.fx import Node, Proxy, Tracer
from torch.fx.proxy import TraceError

from rewrite.tracing.code.functions_run import FunctionsRun, unnoted
from rewrite.tracing.decisions import returns_an_answer
from rewrite.tracing.proxies import ValueProxy, nodes_of
from rewrite.tracing.records import BY_SIZE, Decision, Frame, Trace
from rewrite.tracing.source_lines import runs_in_torch, user_frame

if TYPE_CHECKING:
    from rewrite.tracing.shapes import Shapes

_SPLITS = frozenset(
    {torch.split, torch.chunk, torch.unbind, torch.tensor_split, torch.functional.split}
    | {"split", "chunk", "unbind", "tensor_split"}
)
"""What makes as many parts as the size of its input allows."""

_NUMBERS = (int, float, str, torch.dtype, torch.device, type(None))

_UNROLLED = 64
"""Items of a tensor that a loop over it is followed for."""


class ValueTracer(Tracer):
    """A tracer that answers with known values, and records decisions in the current trace.

    Args:
        shapes: computes the shape of each value, if there are example inputs.
        ran: takes note of the functions that run, if it is given.
    """

    def __init__(self, shapes: Shapes | None, ran: FunctionsRun | None = None) -> None:
        super().__init__()
        self.shapes = shapes
        self._ran = ran
        self._trace: Trace
        self._frames: list[Frame] = []
        self._deciding: dict[FrameType, list[Decision]] = {}

    create_proxy = unnoted(Tracer.create_proxy)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], *given: Any, **named: Any
    ) -> tuple[Any, list[Any]]:
        """Take note of what the forward of the root runs, and of nothing that fx does before."""
        forward, arguments = super().create_args_for_root(root_fn, *given, **named)

        @functools.wraps(forward)
        def run(*values: Any) -> Any:
            with self._noting():
                return forward(*values)

        return run, arguments

    def _noting(self) -> contextlib.AbstractContextManager[None]:
        """Take note of the functions that run in this context."""
        return contextlib.nullcontext() if self._ran is None else self._ran.noted()

    def proxy(self, node: Node) -> Proxy:
        """Return the proxy that stands for the value of `node` in the traced forward."""
        return ValueProxy(node, self)

    @unnoted
    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Iterate over a proxy of known length: parts of a split by sizes, a shape, a container."""
        parts = _parts(obj.node)
        if parts is None and (value := self._known(obj)) is not None:
            parts = len(value) if isinstance(value, tuple | list) else None
            if parts is not None and obj.node.target in _SPLITS:
                self._decide(obj)
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] <= _UNROLLED:
                parts = self.length(obj)
        return super().iter(obj) if parts is None else map(cast(Any, obj).__getitem__, range(parts))

    def keys(self, obj: Proxy) -> Any:
        """Return the keys of a known dict, as of `**kwargs`."""
        value = self._known(obj)
        return list(value) if isinstance(value, dict) else super().keys(obj)

    @unnoted
    def to_bool(self, obj: Proxy) -> bool:
        """Return the value of a condition on known sizes, and record the decision."""
        if isinstance(self._known(obj), bool | int | float | tuple | list | torch.Size):
            return bool(self.number(obj))
        return super().to_bool(obj)  # raises

    @unnoted
    def number(self, obj: Proxy) -> Any:
        """Return the number that a proxy stands for, and record the decision.

        Raises:
            TraceError: it is not known, or is a tensor.
        """
        value = self._known(obj)
        if value is None or isinstance(value, torch.Tensor):
            raise TraceError("needs the value of a tensor or a size as a number")
        self._decide(obj)
        return value

    @unnoted
    def length(self, obj: Proxy) -> int:
        """Return the number of items of a value, and record the decision.

        Raises:
            TraceError: it is not known.
        """
        value = self._known(obj)
        if value is None or isinstance(value, int | float):
            raise TraceError("needs the length of a value that is not known")
        if isinstance(value, torch.Tensor):
            self._decide(obj)
        return len(value)

    def _known(self, obj: Proxy) -> Any:
        """Return the value of a proxy, tensors on meta; None where it is unknown."""
        return None if self.shapes is None else obj.node.meta.get("val")

    def _decide(self, obj: Proxy) -> None:
        """Record that the running line has read a size that differs for other inputs."""
        if not obj.node.meta.get("fixed") and not runs_in_torch():
            self.decide(BY_SIZE)

    def decide(self, when: str) -> None:
        """Record that the running line may branch; `when` is the condition, in words.

        So may the line that called its function, if that returns a condition or a number.
        """
        frame = user_frame()
        while frame is not None:
            self._note_decision(frame, when)
            if frame.f_code.co_name == "forward":
                return
            if when == BY_SIZE and not returns_an_answer(frame.f_code):
                return
            frame = user_frame(frame.f_back)

    def _note_decision(self, frame: FrameType, when: str) -> None:
        held = {
            name: nodes
            for name, value in frame.f_locals.items()
            if (nodes := tuple(nodes_of(value))) or isinstance(value, _NUMBERS)
        }
        at_hand = [node for nodes in held.values() for node in nodes]
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            numbers = (key for key, value in vars(module).items() if isinstance(value, _NUMBERS))
            held.update((f"self.{key}", ()) for key in numbers)
        owner = self._frames[-1].owner
        decision = Decision(owner, frame.f_code, frame.f_lineno, at_hand, held, when)
        self._trace.decisions.append(decision)
        self._deciding.setdefault(frame, []).append(decision)

    def _note_decided(self, node: Node) -> None:
        """Add a new node to the earlier decisions of the functions that compute it."""
        frame = user_frame()
        while frame is not None:
            for decision in self._deciding.get(frame, ()):
                decision.nodes.append(node)
            frame = frame.f_back


def _parts(node: Node) -> int | None:
    """Return the number of parts of a split by a list of sizes; None for any other split."""
    if node.target not in (torch.split, "split", torch.split_with_sizes, "split_with_sizes"):
        return None
    names = ("split_size_or_sections", "split_size", "split_sizes")
    given = [*node.args[1:2], *(node.kwargs[name] for name in names if name in node.kwargs)]
    return len(given[0]) if given and isinstance(given[0], list | tuple) else None
