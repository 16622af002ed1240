"""Deciding, norm by norm, which layers absorb its map, and in which order.

    y = s.x + t

    1. all of it into what produces x                    backward
    2. all of it into what reads y                       forward
    3. s one way and t the other: with y = y' + t first, then y' = s.x; or x' = x + t/s first

Each norm that is folded is from then on passed through; each one that is not may absorb the map of
its neighbours. Decisions are made in data-flow order on vectors; no weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rewrite.affine.algebra import Affine
from rewrite.affine.channel_map import Direction
from rewrite.affine.layers import Side
from rewrite.affine.ledger import Ledger
from rewrite.affine.plan import Absorption
from rewrite.affine.planner import MapRequest, Planner
from rewrite.fold.candidates import Source
from rewrite.fold.requirements import Requirements, culprit, narrowest, uninvertible
from rewrite.graph.captured import Captured
from rewrite.graph.operators import needs_weight
from rewrite.outcomes import Declined

_AFFINE_FLAGS = ("affine", "elementwise_affine")

Part = Literal["both", "scale", "shift", "shift over scale"]


PlanMaker = Callable[[Direction, bool, bool], Absorption | Declined]
"""Plans to absorb a map one way, with its scale, its shift, or both."""


@dataclass(frozen=True, eq=False)
class Move:
    """A part of a map, and the layers that absorb it."""

    absorption: Absorption
    part: Part

    def enter(self, ledger: Ledger, affine: Affine) -> None:
        """Note in `ledger` what each layer absorbs of `affine`."""
        if self.part == "shift over scale":
            affine = Affine(affine.scale, affine.shift / affine.scale)
        self.absorption.enter(
            ledger, affine.part(self.part in ("both", "scale"), self.part != "scale")
        )


@dataclass(frozen=True, eq=False)
class Fold:
    """A source that is folded: its map, where it goes, and what that relies on.

    `keeps` says why a norm keeps a weight and a bias, which do nothing from then on, or is "".
    """

    source: Source
    affine: Affine
    moves: tuple[Move, ...]
    keeps: str = ""

    @property
    def requirements(self) -> Requirements:
        """What has to hold of the map of another checkpoint, too."""
        edits = [edit for move in self.moves for edit in move.absorption.edits]
        inverse = any(edit.inverse for edit in edits)
        return Requirements(
            scales=self.affine.scales,
            adds=self.affine.adds,
            positive=any(move.absorption.needs_positive for move in self.moves),
            invertible=inverse or any(move.part == "shift over scale" for move in self.moves),
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that absorb the map."""
        return tuple(dict.fromkeys(n for move in self.moves for n in move.absorption.layers))


class Folder:
    """Decides about the sources of one captured model, one after the other.

    Args:
        captured: the model.
        compensate: let other layers absorb the inverse map, where a value has other readers or
            meets another in a sum.
        unshare: let a layer with several calls absorb a map at some of them, as a clone.
        bake: let a layer whose weight is computed absorb a map, as a plain layer.
        products: let a linear call whose bias is computed absorb a map of its input.
    """

    def __init__(
        self,
        captured: Captured,
        compensate: bool = False,
        unshare: bool = False,
        bake: bool = False,
        products: bool = True,
    ) -> None:
        self.captured = captured
        self.compensate = compensate
        self.planner = Planner(captured, clone_shared=unshare, bake=bake, products=products)
        self.ledger = Ledger(captured.values)
        self._idle: set[Source] = set()

    def fold_at(self, source: Source, affine: Affine) -> Fold | Declined:
        """Fold `affine`, a map that no node of the model computes, at `source`."""
        found = self._moves(source, affine)
        if isinstance(found, Declined):
            return found
        for move in found:
            move.enter(self.ledger, affine)
        return Fold(source, affine, found)

    def decide(self, source: Source) -> Fold | Declined:
        """Fold `source` in the ledger, or say why it cannot be."""
        if source.refusal:
            return Declined(source.refusal)
        if source.kind == "norm" and (reason := self._uneditable(source)):
            return Declined(reason)
        if reason := self._aliasing(source):
            return Declined(reason)
        affine = source.affine(self.ledger)
        if broken := Requirements().broken_by(affine):
            return Declined(self._blame(source, f"its {broken}"))
        found = self._moves(source, affine)
        if isinstance(found, Declined):
            return found
        if reason := self._loses_gradients(source, found):
            return Declined(reason)
        keeps = self._keeps(source)
        if keeps and not found:
            self._idle.add(source)
            return Declined(f"{keeps}, and it does nothing already")
        fold = Fold(source, affine, found, keeps)
        layers = [edit.layer for move in found for edit in move.absorption.edits]
        if broken := fold.requirements.broken_by(affine, narrowest(layers, self.captured.tensor)):
            return Declined(self._blame(source, f"it {broken}"))
        if source.layer is not None:
            self.ledger.forget(source.layer)
        for move in found:
            move.enter(self.ledger, affine)
        if source.kind != "gain":
            self.planner.folded.update(source.passes_on)
        elif source.layer is not None:
            self.planner.context.gone.add(source.layer.key)
        return fold

    def is_unsure(self, source: Source, declined: Declined) -> bool:
        """Return whether more stands in the way than layers that cannot absorb the map."""
        if source in self._idle:
            return False
        nodes = [node for node in declined.nodes if node not in source.nodes]
        return not nodes or not all(map(self.planner.layer, nodes)) or nodes != [*declined.nodes]

    def replaceable(self, source: Source) -> bool:
        """Return whether a layer of its own can take the place of a norm that stays."""
        return source.kind == "norm" and not source.refusal and not self._uneditable(source)

    def _blame(self, source: Source, reason: str) -> str:
        """Return a reason with the tensor at fault, where it is one of a norm."""
        why = "" if source.layer is None else culprit(source.layer, self.captured.values)
        return f"{reason}: {why}" if why else reason

    def _keeps(self, source: Source) -> str:
        """Return why a norm cannot do without a weight once its affine part is folded, or ""."""
        norm = source.layer
        if source.kind != "gain" or norm is None:
            return ""
        if norm.module is None:
            return "the line that calls it needs a weight"
        if needs_weight(self.captured, norm.module):
            return "the module around it needs a weight"
        if asks := self.captured.code.reads_of(norm.module, _AFFINE_FLAGS):
            return f"{asks} asks whether it has a weight"
        refs = [ref for ref in (norm.weight, norm.bias) if ref is not None]
        if any(map(self.planner.context.tensor_readers.mentioned, refs)):
            return "a line asks for its weight"
        return ""

    def _uneditable(self, source: Source) -> str | None:
        return self.captured.lines.refusal(source.first[0])

    def _loses_gradients(self, source: Source, moves: tuple[Move, ...]) -> str | None:
        """Return why a value would no longer require gradients, as it did behind a norm."""
        held = source.layer and (source.layer.weight, source.layer.bias)
        trained = any(self.captured.tensor(ref).requires_grad for ref in held or () if ref)
        if not trained or any(node.meta.get("no_grad") for node in source.last):
            return None
        for edit in (edit for move in moves for edit in move.absorption.edits):
            calls = self.planner.context.tensor_readers.calls(edit.layer)
            if edit.side is Side.OUTPUT and any(call.meta.get("no_grad") for call in calls):
                return f"{edit.layer.name} runs without gradients, and the norm with them"
        return None

    def _aliasing(self, source: Source) -> str | None:
        """Return why y cannot become x itself: the one is written, and the other read later."""
        if source.kind == "gain":
            return None
        for first, last in zip(source.first, source.last, strict=True):
            if found := self.captured.effects.parted(last, source.inputs[first]):
                write, seen = found
                return (
                    f"{self.planner.called(write)} writes into its output or its input, which "
                    f"would be one value, and {seen.name} sees it"
                )
        return None

    # -- where it goes ------------------------------------------------------------------------

    def _moves(self, source: Source, affine: Affine) -> tuple[Move, ...] | Declined:
        scales, adds = affine.scales, affine.adds
        if not scales and not adds:
            return ()
        positive = affine.positive
        declined: list[Declined] = []
        for absorb_inverse in (False, True)[: 1 + self.compensate]:
            if absorb_inverse and not _invertible(affine, self.captured, source):
                break
            plan = self._planner(source, len(affine.scale), positive, absorb_inverse)
            for direction in (Direction.BACKWARD, Direction.FORWARD):
                absorption = plan(direction, scales, adds)
                if isinstance(absorption, Absorption):
                    return (Move(absorption, "both"),)
                declined.append(absorption)
            if scales and adds:
                safe = _invertible(affine, self.captured, source)
                if split := _split(plan, safe):
                    return split
        told = [one for one in declined[:2] if one.reason]
        reasons = dict.fromkeys(one.reason for one in told)
        return Declined("; ".join(reasons), tuple(n for one in told for n in one.nodes))

    def _planner(
        self, source: Source, channels: int, positive: bool, absorb_inverse: bool
    ) -> PlanMaker:
        def plan(direction: Direction, scale: bool, shift: bool) -> Absorption | Declined:
            backward = direction is Direction.BACKWARD
            if backward and source.kind in ("gain", "input"):
                return Declined("")
            values = source.inputs if backward else {node: node for node in source.last}
            return self.planner.plan(
                MapRequest(
                    direction, values, source.axis, channels, scale, shift, positive, absorb_inverse
                )
            )

        return plan


def _split(plan: PlanMaker, safe: bool) -> tuple[Move, ...] | None:
    """Return moves that take scale and shift different ways, or None."""
    for direction in (Direction.BACKWARD, Direction.FORWARD):
        scale = plan(direction, True, False)
        if isinstance(scale, Declined):
            continue
        shift = plan(Direction.FORWARD, False, True)
        if isinstance(shift, Absorption):
            return (Move(shift, "shift"), Move(scale, "scale"))
        if direction is Direction.FORWARD and not safe:
            continue
        shift = plan(Direction.BACKWARD, False, True)
        if isinstance(shift, Absorption):
            if direction is Direction.BACKWARD:
                return (Move(scale, "scale"), Move(shift, "shift"))
            return (Move(shift, "shift over scale"), Move(scale, "scale"))
    return None


def _invertible(affine: Affine, captured: Captured, source: Source) -> bool:
    """Return whether the inverse map can be absorbed without losing precision."""
    layers = [] if source.layer is None else [source.layer]
    return not uninvertible(affine, narrowest(layers, captured.tensor))
