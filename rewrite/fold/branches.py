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

from rewrite.affine.algebra import Affine
from rewrite.affine.channel_map import DeclinedError
from rewrite.affine.constants import Constants
from rewrite.affine.laws import drops
from rewrite.affine.layers import Layer, layer_of
from rewrite.affine.planner import Planner
from rewrite.fold.links import NEGATIVE, Link, constant_link, norm_link
from rewrite.fold.merged_kernel import Merge, NoMerge, Term, identity_window, window
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Conv, conv_of, norm_of
from rewrite.graph.traits import Trait, call_of, has

_LINES = 64
"""Operations that one merge may cover: a bound on the work, far above any real block."""


_PASSES_ON = ("identity", "contiguous", "dropout")


class Branches:
    """Finds the parallel linear branches of one captured model."""

    def __init__(self, captured: Captured, planner: Planner | None = None) -> None:
        self.captured = captured
        self.planner = planner or Planner(captured)
        self._constants = Constants(captured, self.planner.context.ranks)
        self._order = {node: place for place, node in enumerate(captured.nodes())}

    def find(self) -> Iterator[Merge | NoMerge]:
        """Yield what can be merged, and what looks alike but cannot be, in data-flow order."""
        found: dict[Node, Merge | NoMerge] = {}
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

    def _alike(self, found: dict[Node, Merge | NoMerge], node: Node) -> Merge | NoMerge | None:
        """Return the outcome of a line that runs several times once, if it is always the same."""
        outcome = found[node]
        calls = self.captured.call_sites(node)
        if isinstance(outcome, NoMerge) or len(calls) == 1:
            return outcome
        inside = set(outcome.inside)
        for twin in calls:
            other = found.get(twin)
            if not isinstance(other, Merge) or _layers(other) != _layers(outcome):
                return NoMerge(node, outcome.owner, "its line does something else at another call")
            inside |= other.inside
        return replace(outcome, inside=frozenset(inside)) if node is calls[0] else None

    def again(self, merge: Merge) -> Merge:
        """Return `merge` with the tensors and the folded norms of now."""
        return replace(merge, terms=self._terms(merge.root, merge.source))

    def _merge(self, root: Node) -> Merge | NoMerge | None:
        region = self._region(root)
        if region is None:
            return None
        source, inside = region
        owner = self.captured.owner(root)
        try:
            terms = self._terms(root, source)
        except DeclinedError:
            return None
        convs = [term.conv for term in terms if term.conv is not None]
        if len(terms) < 2 or not convs:
            return None
        try:
            outer = self._outer(convs, len(convs) < len(terms))
            self._check(root, inside, outer, source)
        except DeclinedError as refused:
            return NoMerge(root, owner, str(refused))
        return Merge(root, source, inside, owner, terms, outer)

    def _region(self, root: Node) -> tuple[Node, frozenset[Node]] | None:
        """Return the value that every way to `root` goes through, and what lies between."""
        frontier = [(-self._order[n], n.name, n) for n in self._inputs(root)]
        heapq.heapify(frontier)
        waiting = {n for _, _, n in frontier}
        inside = {root}
        while len(waiting) > 1:
            node = heapq.heappop(frontier)[2]
            waiting.discard(node)
            inputs = self._inputs(node) if self._linear(node) else []
            if not inputs or len(inside) > _LINES:
                return None
            inside.add(node)
            for source in inputs:
                if source not in waiting and source not in inside:
                    waiting.add(source)
                    heapq.heappush(frontier, (-self._order[source], source.name, source))
        return (waiting.pop(), frozenset(inside)) if waiting else None

    def _inputs(self, node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if self._constants.value(n) is None]

    def _linear(self, node: Node) -> bool:
        if has(node, Trait.ADDS) or self._passes_on(node):
            return True
        if self._constants.channel_constant(node) is not None:
            return True
        norm = norm_of(self.captured, node)
        if norm is not None:
            return norm.kind == "batch" and not norm.training and norm.running_mean is not None
        conv = conv_of(self.captured, node)
        return conv is not None and not conv.transposed

    def _passes_on(self, node: Node) -> bool:
        """Return whether `node` returns its input: Identity, dropout in eval mode."""
        inputs = self._inputs(node)
        if len(inputs) != 1 or norm_of(self.captured, node) is not None:
            return False
        call = call_of(self.captured, node)
        if call is None or call.name not in _PASSES_ON:
            return False
        return Trait.DROPS not in call.operation.traits or not drops(call)

    # -- terms --------------------------------------------------------------------------------

    def _terms(self, node: Node, source: Node) -> tuple[Term, ...]:
        """Return the branches between `source` and `node`, which are linear all along."""
        if node in self.planner.folded and node is not source:
            return self._terms(self.planner.folded[node], source)
        if node is source:
            return (Term(None, Affine.identity(self._channels(source))),)
        if has(node, Trait.ADDS) and self._constants.channel_constant(node) is None:
            return self._sum(node, source)
        conv = conv_of(self.captured, node)
        if conv is not None:
            if conv.input is not source:
                raise DeclinedError("a branch with two convolutions")
            channels = self._layer(node).channels_out
            return (Term(conv, Affine.identity(channels)),)
        if self._passes_on(node):
            return self._terms(self._inputs(node)[0], source)
        affine, before, link = self._affine(node)
        terms = self._terms(before, source)
        if any(len(term.affine.scale) != len(affine.scale) for term in terms):
            raise DeclinedError("a map of another number of channels", node)
        return tuple(
            replace(term, affine=affine.after(term.affine), links=(*term.links, link))
            for term in terms
        )

    def _sum(self, node: Node, source: Node) -> tuple[Term, ...]:
        call = call_of(self.captured, node)
        terms = None if call is None else call.terms()
        if terms is None or any(weight not in (1, -1) for _, weight in terms):
            raise DeclinedError("a weighed sum", node)
        found: tuple[Term, ...] = ()
        for value, weight in terms:
            if isinstance(value, Node):
                branches = self._terms(value, source)
                found += branches if weight == 1 else tuple(map(_negative, branches))
            elif value != 0:
                raise DeclinedError("a sum with a number", node)
        return found

    def _affine(self, node: Node) -> tuple[Affine, Node, Link]:
        constant = self._constants.channel_constant(node)
        if constant is not None:
            return constant.affine, constant.operand, constant_link(self.captured, constant)
        layer = self._layer(node)
        if layer.mean is None or layer.var is None:
            raise DeclinedError("not linear")
        tensor = self.captured.tensor
        weight = None if layer.weight is None else tensor(layer.weight)
        bias = None if layer.bias is None else tensor(layer.bias)
        affine = Affine.batch_norm(tensor(layer.mean), tensor(layer.var), weight, bias, layer.eps)
        return affine, self._inputs(node)[0], norm_link(layer)

    def _layer(self, node: Node) -> Layer:
        layer = layer_of(self.captured, node, None)
        if layer is None:
            raise DeclinedError("not linear")
        return layer

    def _channels(self, node: Node) -> int:
        """Return the channels of a value from the convolutions and norms that read or write it."""
        for neighbour in (node, *node.users):
            layer = layer_of(self.captured, neighbour, None)
            if layer is not None and layer.kind in ("kernel", "norm"):
                return layer.channels_out if neighbour is node else layer.channels_in
        raise DeclinedError("an unknown number of channels")

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
        refusal = self.captured.editor.refusal(root)
        if refusal is not None:
            raise DeclinedError(refusal)


def _layers(merge: Merge) -> list[str]:
    return [term.conv.weight.name if term.conv is not None else "" for term in merge.terms]


def _negative(term: Term) -> Term:
    affine = Affine(-term.affine.scale, -term.affine.shift)
    return replace(term, affine=affine, links=(*term.links, NEGATIVE))
