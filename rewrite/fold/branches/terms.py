"""The branches of a sum as terms: each a convolution or nothing, and a map per channel after it.

    term(x) = s.(W * x + c) + t    or    s.x + t
    s.(term_1 + term_2) + t = (s.term_1 + t) + s.term_2

Norms in eval mode, constants per channel, signs and what passes a value on make up s and t.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from rewrite.affine.algebra import Affine
from rewrite.affine.channel_map import DeclinedError
from rewrite.affine.constants import Constants
from rewrite.affine.laws import drops
from rewrite.affine.layers import Layer, layer_of
from rewrite.affine.planner import Planner
from rewrite.fold.branches.kernel import Term
from rewrite.fold.links import NEGATIVE, Link, constant_link, norm_link
from rewrite.graph.captured import Captured
from rewrite.graph.operators import conv_of, norm_of
from rewrite.graph.traits import Trait, call_of, has

_PASSES_ON = ("identity", "contiguous", "dropout")


class BranchTerms:
    """Reads the branches between two values of one captured model."""

    def __init__(self, captured: Captured, planner: Planner, constants: Constants) -> None:
        self.captured = captured
        self.planner = planner
        self._constants = constants

    def inputs(self, node: Node) -> list[Node]:
        """Return what a call reads beside constants."""
        return [n for n in node.all_input_nodes if self._constants.value(n) is None]

    def passes_on(self, node: Node) -> bool:
        """Return whether `node` returns its input: Identity, dropout in eval mode."""
        inputs = self.inputs(node)
        if len(inputs) != 1 or norm_of(self.captured, node) is not None:
            return False
        call = call_of(self.captured, node)
        if call is None or call.name not in _PASSES_ON:
            return False
        return Trait.DROPS not in call.operation.traits or not drops(call)

    def between(self, node: Node, source: Node) -> tuple[Term, ...]:
        """Return the branches between `source` and `node`, which are linear all along.

        Raises:
            DeclinedError: a branch is not linear, or none that one convolution can hold.
        """
        if node in self.planner.folded and node is not source:
            return self.between(self.planner.folded[node], source)
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
        if self.passes_on(node):
            return self.between(self.inputs(node)[0], source)
        affine, before, link = self._affine(node)
        terms = self.between(before, source)
        if any(len(term.affine.scale) != len(affine.scale) for term in terms):
            raise DeclinedError("a map of another number of channels", node)
        # s.(a + b) + t = (s.a + t) + s.b: of several terms one alone takes the shift.
        rest = affine.part(scale=True, shift=False), link.without_shift()
        maps = [(affine, link), *[rest] * (len(terms) - 1)]
        return tuple(
            replace(term, affine=map_.after(term.affine), links=(*term.links, step))
            for term, (map_, step) in zip(terms, maps, strict=True)
        )

    def _sum(self, node: Node, source: Node) -> tuple[Term, ...]:
        call = call_of(self.captured, node)
        terms = None if call is None else call.terms()
        if terms is None or any(weight not in (1, -1) for _, weight in terms):
            raise DeclinedError("a weighed sum", node)
        found: tuple[Term, ...] = ()
        for value, weight in terms:
            if isinstance(value, Node):
                branches = self.between(value, source)
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
        return affine, self.inputs(node)[0], norm_link(layer)

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


def _negative(term: Term) -> Term:
    affine = Affine(-term.affine.scale, -term.affine.shift)
    return replace(term, affine=affine, links=(*term.links, NEGATIVE))
