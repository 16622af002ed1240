"""Whether a stream can be put through a map, and which parameters take the map.

    centre    every writer is given C = I - 11'/d     every reader is a LayerNorm, blind to it
    rotate    every writer is given Q                 RMSNorms hand it on, linear readers undo it

A parameter takes the map if all that read it, in every call, read it so. What no call showed is
held against the code, as for a fold (`rewrite.observe.code.check`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.spellings import is_plain
from rewrite.observe.code.check import CodeCheck, CodeIndex
from rewrite.observe.code.fields import UnobservedLine
from rewrite.observe.evidence import Evidence
from rewrite.observe.export import ObservedCall
from rewrite.observe.labels import Unfollowed
from rewrite.outcomes import Declined
from rewrite.streams.classes import CallKind, ClassReader, ClassSource, ParameterAxis
from rewrite.streams.groups import Stream, alike_in, streams_of, unsummed, values_of
from rewrite.streams.norms import NormCall
from rewrite.streams.values import Values


@dataclass(frozen=True)
class Edit:
    """One axis of one parameter is put through the map, multiplied by `scale` before.

    `alone`: what else holds the parameter keeps the old one.
    """

    tensor: str
    axis: int
    scale: str | None = None
    alone: bool = False


@dataclass(frozen=True, eq=False)
class Followed:
    """The values of a stream in one call, and who reads them: what the code is held against."""

    labels: tuple[Node, ...]
    reads: tuple[ClassReader, ...]


@dataclass(eq=False)
class StreamPlan:
    """A stream that can be put through a map.

    Attributes:
        target: what writes to it first.
        channels: how many it has.
        edits: the parameters that take the map.
        norms: the norms that read it, by name.
        writers, linear_readers: the modules and parameters around it, by name.
        ones: parameters that become one: an edit has absorbed them.
        needs: per parameter, the value that it has to have; asked of a file when there is one.
        inserted: modules behind which the map itself is put, for want of a parameter.
    """

    target: str
    channels: int
    edits: tuple[Edit, ...]
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    linear_readers: tuple[str, ...]
    sites: tuple[tuple[ObservedCall, ClassSource], ...]
    flows: tuple[tuple[ObservedCall, Followed], ...]
    ones: tuple[str, ...] = ()
    needs: dict[str, float] = field(default_factory=dict)
    inserted: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that read it and hand nothing of it on."""
        read = dict.fromkeys((*self.norms, *self.linear_readers))
        return tuple(name for name in read if name not in self.writers)

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that write to it."""
        return self.writers

    @property
    def guarded(self) -> tuple[str, ...]:
        """The modules that no line may call which no observed call took."""
        return tuple(dict.fromkeys((*self.norms, *self.linear_readers, *self.writers)))


@dataclass(frozen=True)
class StreamOptions:
    """What a user allows: as for a fold, and a centring where no parameter can take one."""

    untie: bool = False
    strict_outputs: bool = False
    centre: bool = False


Decision = tuple[str, str, StreamPlan | Declined]
"""Target, what stands there, and what is done."""


class StreamPlanner:
    """Decides about the streams of one captured model; what is asked of them, subclasses say."""

    def __init__(self, captured: Captured, evidence: Evidence, options: StreamOptions) -> None:
        self.captured, self.evidence, self.options = captured, evidence, options
        self.calls = values_of(evidence)
        self._index = CodeIndex(evidence)

    def decide(self) -> Iterator[Decision]:
        """Yield a decision for each stream that is of this kind."""
        streams = streams_of(self.calls)
        for stream in filter(self.wants, streams):
            target, before = self._described(stream)
            channels = next(norm.channels for _, norm in stream.norms())
            try:
                yield target, before, self._planned(stream, target, channels)
            except (Unfollowed, UnobservedLine) as reason:
                yield target, before, Declined(str(reason))
        said: set[str] = set()
        for stream, node in unsummed(self.calls, streams):
            target, before = self._described(stream)
            if self.wants(stream) and target not in said:
                said.add(target)
                ((values, _),) = stream.classes
                by = values.observed.called(node)
                yield target, before, Declined(f"it is joined by {by}, which is no sum")

    def _described(self, stream: Stream) -> tuple[str, str]:
        """Return what writes to a stream first, and what the stream is."""
        values, first = next(stream.sources())
        norms = {self.name_of(v, norm) for v, norm in stream.norms()}
        channels = next(norm.channels for _, norm in stream.norms())
        before = f"residual stream of {channels} channels, read by {len(norms)} norms"
        return source_name(values, first), before

    # -- what a subclass says -------------------------------------------------------------------

    def wants(self, stream: Stream) -> bool:
        """Return whether a stream is one that this planner decides about."""
        raise NotImplementedError

    def widen(self, stream: Stream) -> None:
        """Add the classes that have to change with the stream."""

    def insert(self, stream: Stream, values: Values, source: ClassSource) -> str | None:
        """Return the module behind which the map itself may be put, for want of a parameter."""
        return None

    def check_norm_source(self, stream: Stream, values: Values, source: ClassSource) -> None:
        """Refuse a norm that writes to the stream."""
        raise NotImplementedError

    def read(self, stream: Stream, values: Values, reader: ClassReader) -> ParameterAxis | None:
        """Return the parameter of a reader that takes the map; refuse a reader that cannot."""
        raise NotImplementedError

    def needs(self, stream: Stream) -> dict[str, float]:
        """Return which parameters have to have which value, and refuse those that do not."""
        return {}

    # -- planning -------------------------------------------------------------------------------

    def _planned(self, stream: Stream, target: str, channels: int) -> StreamPlan:
        self.widen(stream)
        uses = _Uses(self)
        writers: dict[str, None] = {}
        inserted: dict[str, None] = {}
        for values, source in stream.sources():
            if source.kind in (CallKind.NORM, CallKind.OTHER) and (
                name := self.insert(stream, values, source)
            ):
                inserted[name] = None
            elif source.kind is CallKind.NORM:
                self.check_norm_source(stream, values, source)
            else:
                uses.write(values, source)
            writers[source_name(values, source)] = None
        readers: dict[str, None] = {}
        for values, reader in stream.readers():
            if (use := self.read(stream, values, reader)) is not None:
                uses.add(values, reader.node, use, None)
                readers[values.observed.owner(reader.node)] = None
        for observed, path in stream.returned():
            path = path.removeprefix("output.")
            raise Unfollowed(f"the model returns it as {path} ({observed.call.name})")
        needs = self.needs(stream)
        edits = uses.checked(stream)
        norms = dict.fromkeys(self.name_of(values, norm) for values, norm in stream.norms())
        for name in dict.fromkeys((*writers, *readers, *norms)):
            if name in self.captured.tree.names:
                for reason in self.captured.hooks(name):
                    raise Unfollowed(f"{name} {reason}")
        plan = StreamPlan(
            target, channels, edits, tuple(norms), tuple(writers), tuple(readers),
            tuple((v.observed, s) for v, s in stream.sources() if s.node.op != "placeholder"),
            _flows(stream), uses.ones(), needs, tuple(inserted),
        )  # fmt: skip
        if "inputs_embeds" in inspect.signature(self.captured.model.forward).parameters:
            plan.notes.append("inputs_embeds have to come from the new embedding")
        CodeCheck(self.captured, self._index, plan).check()
        self._check_wider(stream, plan)
        return plan

    def name_of(self, values: Values, norm: NormCall) -> str:
        """Return the module that a norm is."""
        return values.observed.owner(norm.node)

    def _check_wider(self, stream: Stream, plan: StreamPlan) -> None:
        """Note which outputs of a wider call change, or refuse to change any."""
        wider = self.evidence.wider
        if wider is None:
            return
        values = Values(wider, self.evidence.follower(wider))
        more = Stream([(values, top) for top in alike_in(values, stream)])
        self.widen(more)
        paths = [path.removeprefix("output.") for _, path in more.returned()]
        if not paths:
            return
        changes = f"{wider.call.name} would return another {', '.join(dict.fromkeys(paths))}"
        if self.options.strict_outputs:
            raise Unfollowed(changes)
        plan.notes.append(changes)


class _Uses:
    """Which axes of which parameters take the map, and in which calls."""

    def __init__(self, planner: StreamPlanner) -> None:
        self._planner = planner
        self._edits: dict[str, dict[tuple[int, str | None], None]] = {}
        self._by: dict[tuple[Values, Node, str], set[tuple[int, str | None]]] = {}
        self._owners: dict[str, set[str]] = {}
        self._scales: dict[str, set[tuple[Values, Node]]] = {}

    def ones(self) -> tuple[str, ...]:
        """Return the parameters that edits absorb as a scale."""
        return tuple(self._scales)

    def add(self, values: Values, node: Node, use: ParameterAxis, scale: str | None) -> None:
        """Note that a call reads a parameter that takes the map."""
        self._edits.setdefault(use.tensor, {})[use.axis, scale] = None
        self._by.setdefault((values, node, use.tensor), set()).add((use.axis, scale))
        self._owners.setdefault(use.tensor, set()).add(values.observed.owner(node))

    def write(self, values: Values, source: ClassSource, scale: str | None = None) -> None:
        """Note the parameters of a writer, or refuse it by name."""
        said = f"it is written by {values.observed.called(source.node)}"
        if source.node.op == "placeholder" and not source.uses:
            raise Unfollowed("it begins at an input of the model, which nothing can change")
        if source.problem:
            raise Unfollowed(f"{said}: {source.problem}")
        if source.kind is CallKind.SCALED and scale is None:
            return self._scaled(values, source)
        if not source.uses:
            raise Unfollowed(f"{said}, which takes no map: it is no linear layer")
        for use in source.uses:
            self.add(values, source.node, use, scale)
        return None

    def _scaled(self, values: Values, source: ClassSource) -> None:
        """Note a writer whose output is multiplied by a parameter, channel by channel."""
        assert source.scale is not None and source.inner is not None
        top = values.top(source.inner)
        others = [r for r in values.readers(top) if r.node is not source.node]
        if others or values.returned(top):
            more = values.observed.called(others[0].node) if others else "the caller"
            raise Unfollowed(f"what {source.scale} scales is also read by {more}")
        for inner in values.sources(top):
            self.write(values, inner, source.scale)
        self._scales.setdefault(source.scale, set()).add((values, source.node))

    def checked(self, stream: Stream) -> tuple[Edit, ...]:
        """Return the edits; refuse a parameter that anything else reads."""
        edits = []
        for tensor, ways in self._edits.items():
            own = self._check_readers(stream, tensor, set(ways))
            edits += [Edit(own or tensor, axis, scale, own is not None) for axis, scale in ways]
        for scale, nodes in self._scales.items():
            for values in self._planner.calls:
                for reader, _ in values.follower.readers.get(scale, ()):
                    if (values, reader) not in nodes:
                        raise Unfollowed(
                            f"{scale} is also read by {values.observed.called(reader)}"
                        )
            self._check_holders(scale)
        scaled = {edit.tensor for edit in edits if edit.scale is not None}
        for tensor in scaled:
            if len(self._edits[tensor]) > 1:
                raise Unfollowed(f"{tensor} is scaled in one place and not in another")
        return tuple(edits)

    def _check_readers(
        self, stream: Stream, tensor: str, ways: set[tuple[int, str | None]]
    ) -> str | None:
        """Refuse a parameter that something reads otherwise; return its name if it is untied."""
        for values in self._planner.calls:
            for reader, operand in values.follower.readers.get(tensor, ()):
                if self._by.get((values, reader, tensor)) == ways:
                    continue
                if not stream.holds(values, operand.node):
                    return self._untied(tensor, values, reader)
        self._check_holders(tensor)
        return None

    def _untied(self, tensor: str, values: Values, reader: Node) -> str:
        """Return the name of a tied parameter in its writer, if its reader may have its own."""
        captured = self._planner.captured
        owner = values.observed.owner(reader)
        reason = f"{tensor} is also read by {values.observed.called(reader)}"
        module = captured.module(owner)
        weight = captured.tensor(TensorRef.of(tensor))
        holds = isinstance(module, nn.Linear) and is_plain(module) and module.weight is weight
        held = [TensorRef.of(tensor), *captured.tied(TensorRef.of(tensor))]
        names = [ref.name for ref in held if ref.owner in self._owners[tensor] - {owner}]
        if not holds or len(names) != 1:
            raise Unfollowed(reason)
        if not self._planner.options.untie:
            size = weight.numel() * weight.element_size() / 2**20
            raise Unfollowed(
                f"{reason}: {owner} shares its weight (untie gives it its own, {size:.1f} MiB more)"
            )
        return names[0]

    def _check_holders(self, tensor: str) -> None:
        """Refuse a parameter that a module holds, too, which ran in no observed call."""
        planner = self._planner
        ran = set().union(*(observed.ran for observed in planner.evidence.calls))
        for other in planner.captured.tied(TensorRef.of(tensor)):
            if other.owner not in ran:
                raise Unfollowed(
                    f"{tensor} is also {other.name}, and {other.owner} ran in no observed call"
                )


def source_name(values: Values, source: ClassSource) -> str:
    """Return what a source is called: a parameter, or the module that calls it."""
    if source.kind is CallKind.PARAMETER:
        return source.uses[0].tensor
    return values.observed.owner(source.node) or source.node.name


def _flows(stream: Stream) -> tuple[tuple[ObservedCall, Followed], ...]:
    flows = []
    for values in dict.fromkeys(values for values, _ in stream.classes):
        tops = [top for each, top in stream.classes if each is values]
        nodes = [n for n in values.labels if n.op != "placeholder" and values.top(n) in tops]
        reads = [reader for top in tops for reader in values.readers(top)]
        flows.append((values.observed, Followed(tuple(nodes), tuple(reads))))
    return tuple(flows)
