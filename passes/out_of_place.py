"""Operations that write in place, as operations that return a new tensor.

    ReLU(inplace=True)      ReLU()
    x += y; x.relu_()       x = x + y; x = x.relu()
    v ← f(v)                n = f(v), and n for v in whatever reads v later

The values are equal, the memory is not: what reads the memory of v after the write has to read n.
That holds for every input, in both modes, for outputs and gradients. Hooks on a module's output
(Opacus' per-sample gradients; meta-pytorch/opacus#828) and `torch.func` ask for it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from rewrite.functional.forms import Make, cast, functional, same, written
from rewrite.functional.untraced_writes import untraced_writes
from rewrite.graph.capture import in_other_mode
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.effects import Memory, is_number, shared_inputs
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.tracing.regions import Region, forward_branches, forward_defaults


@dataclass(frozen=True)
class WritePlan:
    """How one write becomes a value.

    Attributes:
        lines: the calls whose line is edited, one a line of code; none where a flag is enough.
        make: what the line becomes; None for a module's call.
        redirected: whether later lines read the new value in place of the old.
    """

    lines: tuple[Node, ...] = ()
    make: Make | None = None
    redirected: bool = False


@dataclass(frozen=True)
class OutOfPlace(Pass):
    """Replace every operation that writes in place by one that returns a new tensor.

    Rewrites:
      1. Modules with a true `inplace` flag: the flag. No line of a forward changes for it.
      2. `x += y`, `x.relu_()`, `torch.clamp_(x, …)`, `F.relu(x, inplace=True)`, `out=x`,
         `x[i] = y`: the line, in the forward that holds it.
      3. Later lines of that forward that read x: they read the new value.

    Declines, with the line: writes whose memory is read later by another forward, through a view or
    by code that no trace took; writes into parameters and buffers; random numbers drawn in place;
    forwards that cannot be traced or edited.
    """

    name: ClassVar[str] = "out-of-place"
    contract: ClassVar[Contract] = Contract.EXACT

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every module with the flag and every line, in data-flow order."""
        other = in_other_mode(captured)
        apart = {} if other is None else _by_place(Writes(other).decide())
        for outcome in Writes(captured).decide():
            twin = apart.get((outcome.target, outcome.before))
            if isinstance(outcome, Site) and twin is not None and not _agree(outcome, twin):
                why = twin.reason if isinstance(twin, Skip) else "later lines read what it writes"
                yield Skip(outcome.target, outcome.before, f"in its other mode: {why}")
            else:
                yield outcome
        for name, opaque in captured.opaque.items():
            module = captured.module(name)
            for line in untraced_writes(module):
                reason = f"{line.place}: its forward cannot be traced: {opaque.reason}"
                yield Skip(name, line.text, reason)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Turn one flag, or edit one line."""
        plan: WritePlan = site.plan
        module = captured.module(site.target)
        owners = tuple(dict.fromkeys(captured.owner(node) for node in plan.lines))
        for name in (site.target, *owners):
            captured.keep_stored(name, captured.module(name))
        if plan.make is None:
            after = f"{type(module).__name__}(inplace=False)"
            module.inplace = False  # type: ignore[assignment]  # an attribute of activations, for nn.Module a Tensor or a Module
        else:
            after = f"{type(module).__name__}'s forward without it"
        for node in plan.lines:
            line = captured.lines.line(node)
            assert isinstance(line, Node)
            operand = line.args[0] if plan.make in (None, same) else written(line) or line.args[0]
            assert isinstance(operand, Node)
            also = (operand,) if plan.redirected else ()
            captured.editor.recompute(node, plan.make or same, also)
        note = "later lines read the new value" if plan.redirected else ""
        return Change(site.target, site.before, after, note, (site.target, *owners))


def _by_place(outcomes: Iterable[Site | Skip]) -> dict[tuple[str, str], Site | Skip]:
    return {(outcome.target, outcome.before): outcome for outcome in outcomes}


def _agree(site: Site, twin: Site | Skip) -> bool:
    """Return whether a write can be the same value in both modes."""
    if isinstance(twin, Skip):
        return False
    return bool(site.plan.redirected) == bool(twin.plan.redirected)


class Writes:
    """The writes of one captured model, and whether each can be a value."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._memories: dict[Region, Memory] = {}
        self._accepted: set[Node] = set()

    def decide(self) -> Iterator[Site | Skip]:
        """Yield each write once: calls in data-flow order, then modules that nothing calls."""
        met: set[object] = set()
        for node in self.captured.nodes():
            calls = self.captured.call_sites(node) if node.op.startswith("call") else ()
            if node in met or not calls:
                continue
            met.update(calls)
            if node.op == "call_module":
                name = str(node.target)
                if self._has_flag(name):
                    met.add(name)
                    yield self._accept(self._module(name, calls), calls)
                continue
            operand = self._operand(node)
            if operand is not None and not is_number(operand):
                yield self._accept(self._line(node, operand, calls), calls)
        for name, _ in self.captured.tree.modules():
            if name not in met and self._has_flag(name):
                yield self._module(name, ())

    def _has_flag(self, name: str) -> bool:
        return getattr(self.captured.module(name), "inplace", False) is True

    def _accept(self, outcome: Site | Skip, calls: tuple[Node, ...]) -> Site | Skip:
        if isinstance(outcome, Site):
            self._accepted.update(calls)
        return outcome

    def _module(self, name: str, calls: tuple[Node, ...]) -> Site | Skip:
        """Decide on the flag of a module."""
        captured = self.captured
        before = f"{type(captured.module(name)).__name__}(inplace=True)"
        if (unseen := captured.opaque_caller(name)) is not None:
            return Skip(name, before, f"{unseen}: it may read again what is written")
        called = tuple(call for call in calls if captured.region_of(call).name != name)
        lines, reason = self._judge(called)
        if reason:
            place = captured.source(called[0])
            return Skip(name, before, f"{place}: {reason}" if place else reason)
        return Site(name, before, calls[0] if calls else None, WritePlan(lines, None, bool(lines)))

    def _operand(self, node: Node) -> Node | None:
        """Return what `node` writes into, None if nothing."""
        if (operand := written(node)) is not None:
            return operand
        first = node.args[0] if self._assigns(node) else None
        return first if isinstance(first, Node) else None

    def _assigns(self, node: Node) -> bool:
        """Return whether `node` is `x += y`; of `x[i] += y`, what writes is the call x[i] = …."""
        if node not in self.captured.region_of(node).augmented:
            return False
        item = node.args[0]
        return not any(
            user.target is operator.setitem
            and user.args[2] is node
            and isinstance(item, Node)
            and item.target is operator.getitem
            and user.args[:2] == item.args
            for user in node.users
        )

    def _line(self, node: Node, operand: Node, calls: tuple[Node, ...]) -> Site | Skip:
        captured = self.captured
        target = captured.owner(node)
        place = captured.source(node) or "generated code"
        before = captured.source_text(node) or node.format_node() or str(node)
        make: Make | str = same if written(node) is None else functional(node, calls)
        if isinstance(make, str):
            return Skip(target, before, f"{place}: {make}")
        later, reason = self._judge(calls)
        if reason or (reason := self._not_editable(node)):
            return Skip(target, before, f"{place}: {reason}")
        if (dtype := _kept_dtype(node, operand)) is not None:
            make = cast(make, dtype)
        return Site(target, before, node, WritePlan((node,), make, bool(later)))

    # -- who reads what was written -----------------------------------------------------------

    def _judge(self, calls: tuple[Node, ...]) -> tuple[tuple[Node, ...], str]:
        """Return the calls whose memory is read later, one a line; or what stands against it."""
        lines: dict[object, Node] = {}
        for call in calls:
            inputs = call.all_input_nodes
            operand = self._operand(call) if call.op != "call_module" else next(iter(inputs), None)
            if not isinstance(operand, Node):
                return (), "what it writes into is no value of the graph"
            later, reason = self._later(call, operand)
            if reason:
                return (), reason
            if later:
                lines.setdefault(self.captured.lines.line(call), call)
        return tuple(lines.values()), ""

    def _later(self, call: Node, operand: Node) -> tuple[bool, str]:
        """Return whether `operand`'s memory is read after `call`, or what stands against it."""
        region = self.captured.region_of(call)
        if region not in self._memories:
            self._memories[region] = Memory(region.graph, self._shares)
        memory = self._memories[region]
        for alias in memory.family(call, operand):
            if reason := self._held(region, alias):
                return False, reason
        readers = [reader for _, reader in memory.later_readers(call, operand)]
        if not readers:
            return False, ""
        frame = self.captured.frame(call)
        last = max(memory.place(node) for node in region.frames if region.frames[node] == frame)
        outside = [reader for reader in readers if memory.place(reader) > last]
        if outside:
            who = self.captured.owner(outside[0]) or "the model"
            return False, f"what it writes into is read again in the forward of {who}"
        return True, self._not_redirectable(call)

    def _not_redirectable(self, call: Node) -> str:
        """Return why the later readers, in the owner's own graph, cannot read the new value."""
        owner = self.captured.owner(call)
        if refusal := self._not_editable(call):
            return f"what it writes into is read again, and the call {refusal}"
        line = self.captured.lines.line(call)
        assert isinstance(line, Node)
        own = self._own_lines(owner)

        def shares(node: Node) -> tuple[Node, ...]:
            flat = own.get(node)
            if flat is not None and flat.op != "call_module" and self._operand(flat) is not None:
                return tuple(node.all_input_nodes[:1])
            return shared_inputs(self.captured, node, owner)

        memory = Memory(line.graph, shares)
        operand = written(line) or line.args[0]
        assert isinstance(operand, Node)
        names = {operand}
        # What an accepted write before this one wrote into goes by the new value too.
        while own.get(operand) in self._accepted and operand.all_input_nodes:
            operand = written(operand) or operand.all_input_nodes[0]
            names.add(operand)
        for alias, reader in memory.later_readers(line, written(line) or line.all_input_nodes[0]):
            if alias not in names:
                return f"what it writes into is read again through {alias} by {reader}"
        return ""

    def _not_editable(self, call: Node) -> str:
        """Return why the line of `call` cannot be edited, or ""."""
        owner = self.captured.owner(call)
        module = self.captured.module(owner)
        if owner and not isinstance(module, GraphModule):
            tested = forward_branches(module, forward_defaults(module))
            if tested:
                names = ", ".join(tested)
                return (
                    f"is a line of the forward of {owner}, which branches on its argument {names}"
                )
        return self.captured.lines.refusal(call, line=True) or ""

    def _own_lines(self, owner: str) -> dict[Node, Node]:
        """Return, per line of the owner's own graph that writes, a call that it made."""
        found: dict[Node, Node] = {}
        for node in self.captured.nodes():
            if not node.op.startswith("call") or self.captured.owner(node) != owner:
                continue
            writes = (
                self._has_flag(str(node.target))
                if node.op == "call_module"
                else self._operand(node) is not None
            )
            if writes and isinstance(line := self.captured.lines.line(node), Node):
                found[line] = node
        return found

    def _held(self, region: Region, alias: Node) -> str:
        """Return who but the graph may read `alias`, or ""."""
        if alias.op == "get_attr":
            return f"writes into {alias.target}, which is the model's state"
        if alias.op == "call_method" and alias.target == "numpy":
            return "writes into an array of numpy, which shares the memory of a tensor"
        if alias.op == "placeholder" and region.name:
            return f"writes into the input of {region.name}, whose caller was not traced"
        if alias in region.kept:
            return f"writes into what is kept as {region.kept[alias]}"
        readers = self.captured.readers(alias)
        if not readers.known and not any(user.op == "output" for user in readers.nodes):
            return readers.reason
        return ""

    def _shares(self, node: Node) -> tuple[Node, ...]:
        if node.op == "call_function" and self._assigns(node):
            return tuple(node.all_input_nodes[:1])
        return shared_inputs(self.captured, node)


def _kept_dtype(node: Node, operand: Node) -> torch.dtype | None:
    """Return the dtype that the memory keeps, where the new value is known to have another."""
    old, new = operand.meta.get("val"), node.meta.get("val")
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.dtype != new.dtype:
        return old.dtype
    return None
