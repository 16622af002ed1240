"""Parallel linear branches as one kernel.

    y = sum_b a_b . (W_b * x + c_b) + sum_d (s_d . x + t_d)  =  W*x + c

    W = sum_b a_b . pad(W_b) + sum_d diag(s_d) at the center,   c = sum_b a_b . c_b + sum_d t_d

Every branch begins at the same x: the value through which each way to y goes (its immediate
dominator). A branch is a convolution or nothing, followed by norms in eval mode and by constants
per channel. All convolutions need the same stride, dilation, groups and padding mode, and have to
see the same window; smaller kernels are padded with zeros, and a branch without one is a Dirac
kernel.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Node

from rewrite.affine.channel_map import DeclinedError
from rewrite.affine.constants import Constants
from rewrite.affine.layers import layer_of
from rewrite.affine.planner import Planner
from rewrite.fold.branches.kernel import Merge, identity_window, window
from rewrite.fold.branches.terms import BranchTerms
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Conv, conv_of, norm_of
from rewrite.graph.traits import Trait, has
from rewrite.outcomes import Declined

_LINES = 64
"""Operations that one merge may cover: a bound on the work, far above any real block."""


class Branches:
    """Finds the parallel linear branches of one captured model."""

    def __init__(self, captured: Captured, planner: Planner | None = None) -> None:
        self.captured = captured
        self.planner = planner or Planner(captured)
        self._constants = Constants(captured, self.planner.context.ranks)
        self._branches = BranchTerms(captured, self.planner, self._constants)
        self._order = {node: place for place, node in enumerate(captured.nodes())}

    def find(self) -> Iterator[Merge | Declined]:
        """Yield what can be merged, and what looks alike but cannot be, in data-flow order.

        The first node of what is declined is the sum.
        """
        found: dict[Node, Merge | Declined] = {}
        covered: set[Node] = set()
        for node in reversed(list(self.captured.nodes())):
            if node in covered or not has(node, Trait.ADDS):
                continue
            outcome = self._merge(node)
            if isinstance(outcome, Merge):
                covered |= outcome.inside
            if outcome is not None:
                found[node] = outcome
        for node in reversed(found):
            outcome = self._alike(found, node)
            if outcome is not None:
                yield outcome

    def _alike(self, found: dict[Node, Merge | Declined], node: Node) -> Merge | Declined | None:
        """Return the outcome of a line that runs several times once, if it is always the same."""
        outcome = found[node]
        calls = self.captured.call_sites(node)
        if isinstance(outcome, Declined) or len(calls) == 1:
            return outcome
        inside = set(outcome.inside)
        for twin in calls:
            other = found.get(twin)
            if not isinstance(other, Merge) or _layers(other) != _layers(outcome):
                return Declined("its line does something else at another call", (node,))
            inside |= other.inside
        return replace(outcome, inside=frozenset(inside)) if node is calls[0] else None

    def again(self, merge: Merge) -> Merge:
        """Return `merge` with the tensors and the folded norms of now."""
        return replace(merge, terms=self._branches.between(merge.root, merge.source))

    def _merge(self, root: Node) -> Merge | Declined | None:
        region = self._region(root)
        if region is None:
            return None
        source, inside = region
        owner = self.captured.owner(root)
        try:
            terms = self._branches.between(root, source)
        except DeclinedError:
            return None
        convs = [term.conv for term in terms if term.conv is not None]
        if len(terms) < 2 or not convs:
            return None
        try:
            outer = self._outer(convs, len(convs) < len(terms))
            self._check(root, inside, outer, source)
        except DeclinedError as error:
            return Declined(error.declined.reason, (root, *error.declined.nodes))
        return Merge(root, source, inside, owner, terms, outer)

    def _region(self, root: Node) -> tuple[Node, frozenset[Node]] | None:
        """Return the value that every way to `root` goes through, and what lies between."""
        frontier = [(-self._order[n], n.name, n) for n in self._branches.inputs(root)]
        heapq.heapify(frontier)
        waiting = {n for _, _, n in frontier}
        inside = {root}
        while len(waiting) > 1:
            node = heapq.heappop(frontier)[2]
            waiting.discard(node)
            inputs = self._branches.inputs(node) if self._linear(node) else []
            if not inputs or len(inside) > _LINES:
                return None
            inside.add(node)
            for source in inputs:
                if source not in waiting and source not in inside:
                    waiting.add(source)
                    heapq.heappush(frontier, (-self._order[source], source.name, source))
        return (waiting.pop(), frozenset(inside)) if waiting else None

    def _linear(self, node: Node) -> bool:
        if has(node, Trait.ADDS) or self._branches.passes_on(node):
            return True
        if self._constants.channel_constant(node) is not None:
            return True
        norm = norm_of(self.captured, node)
        if norm is not None:
            return norm.kind == "batch" and not norm.training and norm.running_mean is not None
        conv = conv_of(self.captured, node)
        return conv is not None and not conv.transposed

    # -- conditions ---------------------------------------------------------------------------

    def _asks_shape(self, root: Node, user: Node, node: Node) -> bool:
        """Return whether `user` only asks for the shape, in a forward that goes with the branch."""
        asks = self.planner.context.rules.reads_only_shape(user, node)
        return asks and self.captured.frame(user) != self.captured.frame(root)

    def _outer(self, convs: list[Conv], has_identity: bool) -> Conv:
        tensor = self.captured.tensor
        widest = max(convs, key=lambda c: tensor(c.weight).shape[2:].numel())
        for conv in convs:
            if isinstance(conv.padding, str):
                raise DeclinedError(f"{conv.target} has padding={conv.padding!r}")
            for what in ("stride", "groups", "padding_mode", "dims"):
                if getattr(conv, what) != getattr(widest, what):
                    raise DeclinedError(
                        f"{conv.target} has {what}={getattr(conv, what)}, {widest.target} has "
                        f"{getattr(widest, what)}"
                    )
            channels, most = len(tensor(conv.weight)), len(tensor(widest.weight))
            if channels != most:
                raise DeclinedError(
                    f"{conv.target} writes {channels} channels, {widest.target} {most}"
                )
            taps = tensor(conv.weight).shape[2:]
            if any(
                t > 1 and d != w
                for t, d, w in zip(taps, conv.dilation, widest.dilation, strict=True)
            ):
                raise DeclinedError(f"{conv.target} and {widest.target} have different dilations")
            if window(conv, widest, self.captured) is None:
                raise DeclinedError(f"{conv.target} and {widest.target} see different windows")
        if has_identity:
            weight = tensor(widest.weight)
            if any(step != 1 for step in widest.stride):
                raise DeclinedError(
                    f"{widest.target} has stride {widest.stride}, the identity has none"
                )
            if weight.shape[0] != weight.shape[1] * widest.groups:
                raise DeclinedError(f"{widest.target} changes the number of channels")
            if identity_window(widest, self.captured) is None:
                raise DeclinedError(f"{widest.target} has no tap at the center of its window")
        return widest

    def _check(self, root: Node, inside: frozenset[Node], outer: Conv, source: Node) -> None:
        first = min(inside, key=self._order.__getitem__)
        if (write := self.captured.effects.written_between(source, first, root)) is not None:
            raise DeclinedError(f"{write.name} writes into what the branches read, between the two")
        for node in inside:
            constant = self._constants.channel_constant(node)
            if constant is not None and constant.axis != -(outer.dims + 1):
                raise DeclinedError(f"{node.name} is by a constant along another axis", node)
            if node is not root:
                for user in set(node.users) - inside:
                    if not self._asks_shape(root, user, node):
                        raise DeclinedError(f"{node.name} is also read outside of the branches")
                readers = self.captured.readers(node)
                if not readers.known:
                    raise DeclinedError(readers.reason)
            layer = layer_of(self.captured, node, None)
            if layer is not None and layer.module is not None:
                for reason in self.captured.hooks(layer.module):
                    raise DeclinedError(f"{layer.module} {reason}")
                if (whole := self.captured.code.read_whole(layer.module)) is not None:
                    raise DeclinedError(whole)
            for ref in (layer.weight, layer.bias) if layer is not None else ():
                if ref is not None and self.captured.written(ref):
                    raise DeclinedError(f"{ref.name} is written by a forward")
        refusal = self.captured.lines.refusal(root)
        if refusal is not None:
            raise DeclinedError(refusal)


def _layers(merge: Merge) -> list[str]:
    return [term.conv.weight.name if term.conv is not None else "" for term in merge.terms]
