"""Residual branches, found in the graph.

    y = s(x) + f(x)        f: layers;  s: the identity, or fewer layers (a projection)

An addition is residual if both sides come from one value x, and one side passes more layers than
the other. The names of blocks play no part; depthwise layers do not count, so that a separable
projection is one layer. What makes a branch vanish is its *tail* (rewrite.residual_tails).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn
from torch.fx import Node

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.operators import conv_of, linear_of, norm_of
from rewrite.graph.traits import Trait, has, named
from rewrite.init.residual_tails import Tail, TailFinder, is_product, is_sum, layer_tail
from rewrite.outcomes import Declined
from rewrite.tracing.regions import Region
from rewrite.weights.fans import linear_maps

_LARGEST_BRANCH = 600  # nodes; what is longer is a skip across the network


@dataclass(frozen=True)
class Residual:
    """One residual addition.

    Attributes:
        target: the module whose forward adds.
        tails: what makes the branch vanish, all of them together; empty if nothing was found.
        layers: the weights of the branch, in data-flow order.
        reason: why `tails` is empty.
        node, shortcut, branch: the addition and its two sides, unless a layer of torch.nn adds.
        sources: the values from which both sides come.
    """

    target: str
    tails: tuple[Tail, ...]
    layers: tuple[TensorRef, ...]
    reason: str = ""
    node: Node | None = None
    shortcut: Node | None = None
    branch: Node | None = None
    sources: frozenset[Node] = frozenset()


def residual_branches(captured: Captured) -> list[Residual]:
    """Return every residual addition of a model, in data-flow order within each graph."""
    found: list[Residual] = []
    for region in captured.regions:
        found += _Finder(captured, region).run()
    return found


@dataclass
class _Finder:
    """Looks for residual additions in one graph; ancestors are bit sets over its nodes."""

    captured: Captured
    region: Region
    nodes: list[Node] = field(default_factory=list)
    index: dict[Node, int] = field(default_factory=dict)
    above: list[int] = field(default_factory=list)
    constant: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ends = TailFinder(self.captured, self.constant, self._leads)

    def run(self) -> list[Residual]:
        found: list[Residual] = []
        for position, node in enumerate(self.region.graph.nodes):
            mask = 1 << position
            for source in node.all_input_nodes:
                mask |= self.above[self.index[source]]
            self.nodes.append(node)
            self.index[node] = position
            self.above.append(mask)
            if self._is_constant(node):
                self.constant.add(node)
            elif node.op == "call_module":
                found += _inside_transformer_layer(self.captured, str(node.target))
            elif is_sum(node) and (one := self._addition(node, found)):
                found.append(one)
        return found

    def _is_constant(self, node: Node) -> bool:
        """Return whether the value depends on no input, or on the shape of one alone."""
        if node.op in ("placeholder", "output"):
            return False
        shape = named(node, "size", "dim") or (
            named(node, "getattr") and node.args[1] in ("shape", "ndim", "dtype", "device")
        )
        return shape or all(source in self.constant for source in node.all_input_nodes)

    def _leads(self, source: Node, node: Node) -> bool:
        return bool(self.above[self.index[node]] >> self.index[source] & 1)

    def _addition(self, node: Node, before: list[Residual]) -> Residual | None:
        sides = node.all_input_nodes
        if len(sides) != 2 or any(side in self.constant for side in sides):
            return None
        own = [self._only(sides[0], sides[1]), self._only(sides[1], sides[0])]
        layers = [self._layers(nodes) for nodes in own]
        costs: list[tuple[int, ...]] = [(len(weights),) for weights in layers]
        if costs[0] == costs[1]:
            costs = [self._norms_and_scales(nodes) for nodes in own]
        for residual in before:
            if residual.node in sides and len(residual.node.users) == 1:
                short = sides.index(residual.node)
                shared = self._one_source(own[1 - short], own[short], sides[short])
                if shared & residual.sources and layers[1 - short]:
                    found = self._residual(node, sides, short, own, layers, shared)
                    before.remove(residual)
                    return _continued(residual, found)
        short = 1 if costs[0] > costs[1] else 0
        if costs[0] == costs[1] or len(self._dense(layers[short])) > 1:
            return None
        shared = self._one_source(own[1 - short], own[short], sides[short])
        return self._residual(node, sides, short, own, layers, shared) if shared else None

    def _residual(
        self,
        node: Node,
        sides: list[Node],
        short: int,
        own: list[list[Node]],
        layers: list[list[TensorRef]],
        sources: frozenset[Node],
    ) -> Residual:
        tails = self.ends.tails(sides[1 - short], set(own[1 - short]))
        return Residual(
            self.captured.owner(node),
            () if isinstance(tails, Declined) else tuple(dict.fromkeys(tails)),
            tuple(dict.fromkeys(layers[1 - short])),
            tails.reason if isinstance(tails, Declined) else "",
            node,
            sides[short],
            sides[1 - short],
            sources,
        )

    def _only(self, node: Node, other: Node) -> list[Node]:
        """Return the nodes that lead to `node` and not to `other`, without parameters."""
        bits = self.above[self.index[node]] & ~self.above[self.index[other]]
        if bits.bit_count() > _LARGEST_BRANCH:
            return [node]
        found = []
        while bits:
            low = bits & -bits
            item = self.nodes[low.bit_length() - 1]
            if item not in self.constant:
                found.append(item)
            bits ^= low
        return found

    def _layers(self, nodes: Iterable[Node]) -> list[TensorRef]:
        found: list[TensorRef] = []
        for node in nodes:
            if node.op == "call_module":
                name = self.captured.tree.name(self.captured.module(str(node.target)))
                found += _weights_inside(self.captured, name)
            elif applied := conv_of(self.captured, node) or linear_of(self.captured, node):
                found.append(applied.weight)
            elif (weight := self.ends.computed_weight(node)) is not None:
                found.append(weight)
        return found

    def _norms_and_scales(self, nodes: Iterable[Node]) -> tuple[int, int]:
        norms = scales = 0
        for node in nodes:
            norms += norm_of(self.captured, node) is not None
            factors = node.all_input_nodes if is_product(node) else []
            scales += any(self.ends.switch(factor) is not None for factor in factors)
        return norms, scales

    def _dense(self, weights: Iterable[TensorRef]) -> list[TensorRef]:
        """Return the weights that mix channels: a separable projection has one of them."""
        return [
            ref
            for ref in weights
            if not 1
            < getattr(self.captured.module(ref.owner), "groups", 1)
            == getattr(self.captured.module(ref.owner), "in_channels", None)
        ]

    def _one_source(self, branch: list[Node], shortcut: list[Node], side: Node) -> frozenset[Node]:
        """Return the values at which both sides begin, if the shortcut carries them."""
        if any(has(node, Trait.CONTRACTS) for node in shortcut):
            return frozenset()  # a sum inside of an attention
        if any(named(node, "interpolate") for node in branch):
            # A pyramid's way down: coarse features are added, not a correction.
            return frozenset()
        starts = self._sources(shortcut) if shortcut else {side}
        return frozenset(
            node for node in starts & self._sources(branch) if not has(node, Trait.SPLITS)
        )

    def _sources(self, nodes: list[Node]) -> set[Node]:
        inside = set(nodes)
        return {
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in inside and source not in self.constant
        }


def _continued(inner: Residual, outer: Residual) -> Residual:
    """Return the sum `outer`, whose shortcut is the sum `inner`, as one residual.

    A sum of three or more branches of one value (RepVGG, MobileOne) is several additions.
    """
    return replace(
        outer,
        tails=(*inner.tails, *outer.tails) if inner.tails and outer.tails else (),
        layers=(*inner.layers, *outer.layers),
        reason=inner.reason or outer.reason,
        shortcut=inner.shortcut,
    )


def _weights_inside(captured: Captured, name: str) -> Iterator[TensorRef]:
    """Yield the weights of the layer called `name`, and of the layers below it."""
    prefix = f"{name}." if name else ""
    for below, module in captured.tree.modules():
        if below == name or below.startswith(prefix):
            for parameter in dict.fromkeys(m.parameter for m in linear_maps(module)):
                yield TensorRef(below, parameter)


def _inside_transformer_layer(captured: Captured, name: str) -> Iterator[Residual]:
    """Yield the branches of PyTorch's own encoder and decoder layers, which are single calls."""
    for below, module in captured.tree.modules():
        if below != name and not below.startswith(f"{name}."):
            continue
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            continue
        branches = [("self_attn", "self_attn.out_proj"), ("linear1", "linear2")]
        if isinstance(module, nn.TransformerDecoderLayer):
            branches.insert(1, ("multihead_attn", "multihead_attn.out_proj"))
        for first, last in branches:
            layer = module.get_submodule(last)
            tail = layer_tail(f"{below}.{last}", layer)
            assert tail is not None
            layers = dict.fromkeys([*_weights_inside(captured, f"{below}.{first}"), tail.weight])
            yield Residual(below, (tail,), tuple(layers))
