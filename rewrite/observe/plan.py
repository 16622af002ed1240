"""Which norms of observed calls fold: every reader, in every call, absorbs the map alike.

    1. the weight is read by recognized calls of the norm alone, as one expression a.w + c
    2. each value of each call is followed to layers; nothing else reads it, nothing returns it
    3. each reader's parameter is read, in all calls, with the same channels, or by other rows

What no call showed is not decided here but in `rewrite.observe.code.check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.spellings import is_plain
from rewrite.observe.evidence import Evidence
from rewrite.observe.export import ObservedCall
from rewrite.observe.flow import Flow, Read
from rewrite.observe.labels import Unfollowed
from rewrite.observe.new_bias import adds_new_bias
from rewrite.observe.norms import Expression, ObservedNorm, expression_of, norms_of
from rewrite.observe.spellings import FORM, op_name, shape_of
from rewrite.observe.weight_axes import Axis
from rewrite.outcomes import Declined


@dataclass(frozen=True)
class Options:
    """What is allowed: cloning a tied head, and other outputs of calls with other arguments.

    Attributes:
        untie: a head that shares its weight with the embedding may get its own.
        strict_outputs: the call for all hidden states has to return what it did.
        strict_code: no code may return the value, also none that no call took.
    """

    untie: bool = False
    strict_outputs: bool = False
    strict_code: bool = False


@dataclass(frozen=True, eq=False)
class ReaderEdit:
    """One parameter absorbs the map.

    Attributes:
        read: one of the calls that read so.
        layer: the module to report: the owner of the call.
        bias: the name of the bias that absorbs a shift; None where there is none to absorb.
        has_bias: whether it exists already.
        untied: the name that the parameter gets of its own, if it was shared.
    """

    read: Read
    layer: str
    bias: str | None
    has_bias: bool
    untied: str | None = None


@dataclass(eq=False)
class ObservedFold:
    """A norm that folds: its parameters, and its readers."""

    target: str
    weight: Expression
    bias: str | None
    kind: str
    channels: int
    edits: tuple[ReaderEdit, ...]
    sites: tuple[tuple[ObservedCall, ObservedNorm], ...]
    flows: tuple[tuple[ObservedCall, Flow], ...]
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that absorb the map."""
        return tuple(dict.fromkeys(edit.layer for edit in self.edits))

    @property
    def targets(self) -> tuple[str, ...]:
        """The norm itself."""
        return (self.target,)

    @property
    def guarded(self) -> tuple[str, ...]:
        """The modules that no line may call which no observed call took."""
        return (*self.layers, self.target)


Sites = Sequence[tuple[ObservedCall, ObservedNorm]]


class ObservedPlanner:
    """Decides about the norms of one captured model, from the evidence of its calls."""

    def __init__(self, captured: Captured, evidence: Evidence, options: Options) -> None:
        self.captured = captured
        self.evidence = evidence
        self.options = options

    def decide(self) -> Iterator[tuple[str, str, ObservedFold | Declined]]:
        """Yield (target, what stands there, decision) for each norm that a call showed."""
        found: dict[str, list[tuple[ObservedCall, ObservedNorm]]] = {}
        for observed in self.evidence.calls:
            for norm in norms_of(observed):
                found.setdefault(norm.weight.tensor, []).append((observed, norm))
        for tensor, sites in found.items():
            target = tensor.rpartition(".")[0]
            try:
                decision: ObservedFold | Declined = self._fold(target, sites)
            except Unfollowed as reason:
                decision = Declined(str(reason))
            yield target, self._described(target, sites[0][1]), decision

    def _described(self, target: str, norm: ObservedNorm) -> str:
        module = type(self.captured.module(target)).__name__
        return f"{module}({_channels(norm)})"

    def _fold(self, target: str, sites: Sites) -> ObservedFold:
        norm = sites[0][1]
        expression = norm.weight
        same = {(s.weight.factor, s.weight.offset, _bias(s)) for _, s in sites}
        if len(same) > 1:
            raise Unfollowed("its weight is read in two ways")
        for reason in self.captured.hooks(target):
            raise Unfollowed(f"{target} {reason}")
        self._check_parameters(sites)
        flows = []
        for observed in self.evidence.calls:
            calls = {s.node: _channels(s) for o, s in sites if o is observed}
            if calls:
                flows.append((observed, self.evidence.follower(observed).follow(calls)))
        bias = _bias(norm)
        for name in filter(None, (expression.tensor, bias)):
            held = self.captured.tensor(TensorRef.of(name))
            if held.device.type != "meta" and not bool(held.isfinite().all()):
                raise Unfollowed(f"{name} holds values that are not finite")
        adds = bias is not None and self._nonzero(bias)
        if adds and (why := next((f.no_shift for _, f in flows if f.no_shift), "")):
            raise Unfollowed(f"{why}, and {bias} is not zero")
        edits = tuple(self._edits(flows, adds))
        if not edits:
            raise Unfollowed("no layer reads it in the observed calls")
        steps = dict.fromkeys(step for _, flow in flows for step in flow.of_size if adds)
        return ObservedFold(
            target, expression, bias, norm.kind, _channels(norm), edits, tuple(sites),
            tuple(flows),
            [f"holds for inputs of this size, for which {step} adds nothing" for step in steps],
        )  # fmt: skip

    # -- the norm's own parameters ------------------------------------------------------------

    def _check_parameters(self, sites: Sites) -> None:
        """Refuse a weight or bias that anything but the calls of the norm reads."""
        inside = {(o, node) for o, s in sites for node in s.inside}
        for name in filter(None, (sites[0][1].weight.tensor, _bias(sites[0][1]))):
            for observed in self.evidence.calls:
                for placeholder in observed.placeholders(name):
                    for reader in _other_readers(observed, placeholder, inside):
                        called = observed.called(reader)
                        raise Unfollowed(f"{name} is also read by {called}")
            self._check_holders(name)

    def _check_holders(self, name: str) -> None:
        """Refuse a tensor that a module holds, too, which ran in no observed call."""
        ran = set().union(*(observed.ran for observed in self.evidence.calls))
        ref = TensorRef.of(name)
        tied = self.captured.tied(ref)
        for holder in (ref, *tied) if tied else ():
            if holder.owner not in ran:
                others = ", ".join(other.name for other in (ref, *tied) if other != holder)
                raise Unfollowed(
                    f"{others} is also {holder.name}, and {holder.owner} ran in no observed call"
                )

    def _nonzero(self, name: str) -> bool:
        tensor = self.captured.tensor(TensorRef.of(name))
        return tensor.device.type == "meta" or bool(tensor.any())

    # -- readers ------------------------------------------------------------------------------

    def _edits(
        self, flows: Sequence[tuple[ObservedCall, Flow]], adds: bool
    ) -> Iterator[ReaderEdit]:
        grouped: dict[tuple[str, int, tuple[object, ...]], list[tuple[ObservedCall, Read]]] = {}
        for observed, flow in flows:
            for read in flow.reads:
                key = (read.tensor, read.axis, read.operand.part(read.axis) and _parts(self, read))
                grouped.setdefault(key, []).append((observed, read))
        for (tensor, _, _), reads in grouped.items():
            observed, first = reads[0]
            if any(read.channels != first.channels for _, read in reads):
                raise Unfollowed(f"{tensor} reads it in two orders")
            untied = self._check_readers(tensor, reads, flows)
            layer = observed.owner(first.node) or tensor.rpartition(".")[0]
            for reason in self.captured.hooks(layer):
                raise Unfollowed(f"{layer} {reason}")
            bias, has_bias = self._bias(tensor, layer, reads) if adds else (None, False)
            yield ReaderEdit(first, layer, bias, has_bias, untied)

    def _check_readers(
        self,
        tensor: str,
        reads: Sequence[tuple[ObservedCall, Read]],
        flows: Sequence[tuple[ObservedCall, Flow]],
    ) -> str | None:
        """Refuse a parameter that is read by anything else; return its name if it is untied."""
        mine = {(o, r.node) for o, r in reads}
        ours = _parts(self, reads[0][1])
        mapped = {(o, r.node, _parts(self, r)) for o, f in flows for r in f.reads}
        for observed in self.evidence.calls:
            for reader, operand in self.evidence.follower(observed).readers.get(tensor, ()):
                theirs = _ranges(operand.part(reads[0][1].axis), self._shape(tensor))
                if (observed, reader) in mine and theirs == ours:
                    continue
                if (observed, reader, theirs) in mapped and _disjoint(ours, theirs):
                    continue
                if _disjoint(ours, theirs):
                    continue
                return self._untied(tensor, reads, observed, reader)
        if tensor not in {name for o in self.evidence.calls for name in o.tensors.values()}:
            raise Unfollowed(f"{tensor} is not a parameter of the model")
        try:
            self._check_holders(tensor)
        except Unfollowed as reason:
            observed, first = reads[0]
            if not self.options.untie:
                raise
            return self._untied(tensor, reads, observed, first.node, str(reason))
        return None

    def _untied(
        self,
        tensor: str,
        reads: Sequence[tuple[ObservedCall, Read]],
        observed: ObservedCall,
        reader: Node,
        reason: str = "",
    ) -> str:
        """Return the name that a shared weight gets in its reader, if that may have its own."""
        called = observed.called(reader)
        reason = reason or f"{tensor} is also read by {called}"
        owners = {o.owner(r.node) for o, r in reads}
        weight = self.captured.tensor(TensorRef.of(tensor))
        size = weight.numel() * weight.element_size() / 2**20
        if len(owners) != 1:
            raise Unfollowed(reason)
        owner = owners.pop()
        module = self.captured.module(owner)
        holds = isinstance(module, nn.Linear) and is_plain(module) and module.weight is weight
        if not holds or (observed.owner(reader) == owner and not reason):
            raise Unfollowed(reason)
        if not self.options.untie:
            raise Unfollowed(
                f"{reason}: {owner} shares its weight (untie gives it its own, {size:.1f} MiB more)"
            )
        return f"{owner}.weight"

    def _bias(
        self, tensor: str, layer: str, reads: Sequence[tuple[ObservedCall, Read]]
    ) -> tuple[str, bool]:
        """Return the bias that absorbs a shift, and whether it exists."""
        names = {read.bias[0] if read.bias else None for _, read in reads}
        if names == {None} and all(read.bare for _, read in reads):
            module = self.captured.module(layer)
            standard = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            same = standard and module.weight is self.captured.tensor(TensorRef.of(tensor))
            if not same or module.bias is not None or not _takes_bias(module, reads[0][1]):
                raise Unfollowed(f"{layer} has no bias to absorb a shift, and cannot be given one")
            return f"{layer}.bias", False
        if len(names) != 1 or None in names:
            raise Unfollowed(f"{layer} adds a bias that is computed")
        name = str(names.pop())
        mine = {(o, r.node) for o, r in reads}
        for observed in self.evidence.calls:
            for reader, _ in self.evidence.follower(observed).readers.get(name, ()):
                parts = [o.part(-1) for n, o in self.evidence.follower(observed).readers[name]]
                if (observed, reader) not in mine and len(set(parts)) < 2:
                    called = observed.called(reader)
                    raise Unfollowed(f"{name} is also read by {called}")
        self._check_holders(name)
        return name, True

    def _shape(self, tensor: str) -> torch.Size:
        return self.captured.tensor(TensorRef.of(tensor)).shape


def _takes_bias(layer: nn.Module, read: Read) -> bool:
    """Return whether a layer without a bias adds one that it gets."""
    if is_plain(layer):
        return True
    value = next((n for n in read.node.all_input_nodes if n is not read.operand.node), None)
    shape = None if value is None else shape_of(value)
    return shape is not None and adds_new_bias(layer, shape)


def _bias(norm: ObservedNorm) -> str | None:
    return None if norm.bias is None else norm.bias.tensor


def _channels(norm: ObservedNorm) -> int:
    shape = shape_of(norm.node)
    return shape[-1] if shape else 0


def _parts(planner: ObservedPlanner, read: Read) -> tuple[tuple[int, int, int], ...]:
    return _ranges(read.operand.part(read.axis), planner._shape(read.tensor))


def _ranges(parts: Iterable[Axis], shape: torch.Size) -> tuple[tuple[int, int, int], ...]:
    """Return which part of which axes an operand holds; () for the whole parameter."""
    return tuple(
        (a.axis, a.start, a.length)
        for a in sorted(parts, key=lambda a: a.axis)
        if (a.start, a.length) != (0, shape[a.axis])
    )


def _disjoint(
    ours: tuple[tuple[int, int, int], ...], theirs: tuple[tuple[int, int, int], ...]
) -> bool:
    """Return whether two parts of a parameter share no element."""
    held = {axis: (start, start + length) for axis, start, length in ours}
    for axis, start, length in theirs:
        if axis in held and (start >= held[axis][1] or start + length <= held[axis][0]):
            return True
    return False


def _other_readers(
    observed: ObservedCall, node: Node, inside: set[tuple[ObservedCall, Node]]
) -> Iterator[Node]:
    for user in node.users:
        if (observed, user) in inside or op_name(user) in FORM:
            continue
        if user.op == "call_function" and expression_of(observed, user) is not None:
            yield from _other_readers(observed, user, inside)
        else:
            yield user
