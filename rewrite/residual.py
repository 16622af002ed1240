"""Residual branches, found in the graph.

    y = s(x) + f(x)        f: layers;  s: the identity, or fewer layers (a projection)

An addition is residual if both sides come from one value x, and one side passes more layers than
the other. The names of blocks play no part. The *tail* of a branch is what makes it vanish:

    f(x) = t(norm(h))        gamma = beta = 0    ->  f(x) = 0        t: anything with t(0) = 0
    f(x) = t(W h + b)        W = b = 0           ->  f(x) = 0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from torch.fx import Node

from rewrite.capture import Captured, TensorRef
from rewrite.fans import linear_maps
from rewrite.operators import activation_of, conv_of, function_name, linear_of, norm_of
from rewrite.regions import Region

TailKind = Literal["norm", "weight", "scale"]

_ADDITIONS = ("add", "iadd", "__add__", "__iadd__", "__radd__")
_PRODUCTS = ("mul", "imul", "multiply", "__mul__", "__imul__", "__rmul__")
_SPLITS = ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")
_LARGEST_BRANCH = 600  # nodes; what is longer is a skip across the network
_NOT_DATA = ("size", "getattr", "arange", "zeros", "ones", "full", "tril", "triu", "dim")

# Functions with f(0) = 0 that hand on the value of their first argument.
HANDED_ON = frozenset(
    {
        "reshape", "view", "permute", "transpose", "swapaxes", "movedim", "moveaxis", "flatten",
        "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "to", "float", "half",
        "type_as", "expand", "expand_as", "repeat", "roll", "flip", "getitem", "narrow",
        "select", "pad", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
        "feature_alpha_dropout", "stochastic_depth", "drop_path", "mean", "sum", "amax",
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d",
        "interpolate", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "fold", "unfold",
        "t", "neg", "div", "truediv", "__truediv__", "true_divide", "rot90", "permute_copy",
        "view_copy", "index_select", "gather", "reshape_as", "view_as",
    }
)  # fmt: skip
_ZERO_AT_ZERO = frozenset(
    {
        "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish",
        "hardswish", "hardtanh", "tanh", "softsign", "tanhshrink", "hardshrink", "softshrink",
        "rrelu",
    }
)  # fmt: skip
TRANSPARENT = (
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ZeroPad2d,
    nn.Fold,
    nn.Unfold,
)


@dataclass(frozen=True)
class Tail:
    """The last thing of a branch that can make it vanish: its scale and its shift.

    A norm's gamma and beta, a layer's weight and bias, or a learned scale alone.
    """

    kind: TailKind
    weight: TensorRef
    bias: TensorRef | None = None


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

    def run(self) -> list[Residual]:
        found: list[Residual] = []
        for position, node in enumerate(self.region.graph.nodes):
            mask = 1 << position
            for source in node.all_input_nodes:
                mask |= self.above[self.index[source]]
            self.nodes.append(node)
            self.index[node] = position
            self.above.append(mask)
            if node.op == "call_module":
                found += _inside_transformer_layer(self.captured, str(node.target))
            elif function_name(node) in _ADDITIONS and (one := self._addition(node, found)):
                found.append(one)
        return found

    def _addition(self, node: Node, before: list[Residual]) -> Residual | None:
        sides = node.all_input_nodes
        if len(sides) != 2 or any(side.op == "get_attr" for side in sides):
            return None
        own = [self._only(sides[0], sides[1]), self._only(sides[1], sides[0])]
        layers = [self._layers(nodes) for nodes in own]
        norms = [sum(norm_of(self.captured, n) is not None for n in nodes) for nodes in own]
        costs = [(len(layers[i]), norms[i]) for i in (0, 1)]
        for residual in before:
            if residual.node in sides and len(residual.node.users) == 1:
                short = sides.index(residual.node)
                shared = self._one_source(own[1 - short], own[short], sides[short])
                if shared & residual.sources and layers[1 - short]:
                    found = self._residual(node, sides, short, own, layers, shared)
                    before.remove(residual)
                    return _continued(residual, found)
        short = 1 if costs[0] > costs[1] else 0
        if costs[0] == costs[1] or len(layers[short]) > 1:
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
        tails = self._tails(sides[1 - short], set(own[1 - short]))
        return Residual(
            self.captured.owner(node),
            () if isinstance(tails, str) else tuple(dict.fromkeys(tails)),
            tuple(dict.fromkeys(layers[1 - short])),
            tails if isinstance(tails, str) else "",
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
            if item.op != "get_attr":
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
        return found

    def _one_source(self, branch: list[Node], shortcut: list[Node], side: Node) -> frozenset[Node]:
        """Return the values at which both sides begin, if the shortcut carries them."""
        if any(function_name(node) in _NOT_DATA for node in shortcut):
            return frozenset()
        if any(function_name(node) in ("interpolate", "upsample") for node in branch):
            # A pyramid's way down: coarse features are added, not a correction.
            return frozenset()
        starts = _sources(shortcut) if shortcut else {side}
        return frozenset(
            node
            for node in starts & _sources(branch)
            if function_name(node) not in _SPLITS and function_name(node) not in _NOT_DATA
        )

    # -- the end of a branch ----------------------------------------------------------------------

    def _tails(self, node: Node, inside: set[Node]) -> list[Tail] | str:
        """Walk back from the end of a branch to what makes it zero; or say what is in the way."""
        scale: Tail | None = None
        while node in inside:
            if (end := self._end(node)) is not None:
                return [end]
            name = function_name(node)
            if name in _ADDITIONS or name == "cat":
                return self._all_tails(node, inside)
            if name in _PRODUCTS:
                node, factor = self._product(node)
                scale = scale or factor
                continue
            if not self._hands_on(node):
                break
            node = node.all_input_nodes[0]
        if scale is not None:
            return [scale]
        last = function_name(node) or node.target
        return f"the branch ends in {last}, which no weight switches off"

    def _all_tails(self, node: Node, inside: set[Node]) -> list[Tail] | str:
        tails: list[Tail] = []
        for side in node.all_input_nodes:
            found = self._tails(side, inside)
            if isinstance(found, str):
                return found
            tails += found
        return tails

    def _end(self, node: Node) -> Tail | None:
        if (norm := norm_of(self.captured, node)) is not None:
            return Tail("norm", norm.weight, norm.bias) if norm.weight is not None else None
        applied = conv_of(self.captured, node) or linear_of(self.captured, node)
        if applied is not None:
            return Tail("weight", applied.weight, applied.bias)
        if node.op != "call_module":
            return None
        name = str(node.target)
        module = self.captured.module(name)
        if isinstance(module, nn.MultiheadAttention):
            name, module = f"{name}.out_proj", module.out_proj
        return _layer_tail(name, module)

    def _product(self, node: Node) -> tuple[Node, Tail | None]:
        """Return the factor that carries the branch, and the learned scale on it, if any."""
        factors = node.all_input_nodes
        constants = [f for f in factors if f.op == "get_attr"]
        others = [f for f in factors if f.op != "get_attr"]
        if not others:
            return factors[0], None
        ref = self.captured.ref(constants[0]) if constants else None
        learned = ref is not None and ref.attr in self.captured.module(ref.owner)._parameters
        scale = Tail("scale", ref) if ref is not None and learned else None
        if len(others) == 2 and self.above[self.index[others[0]]] >> self.index[others[1]] & 1:
            return others[1], scale  # the first factor is a gate made from the second
        return others[0], scale

    def _hands_on(self, node: Node) -> bool:
        if not node.all_input_nodes:
            return False
        activation = activation_of(self.captured, node)
        if activation is not None:
            return activation.name in _ZERO_AT_ZERO
        if (norm := norm_of(self.captured, node)) is not None:
            return norm.bias is None
        if node.op == "call_module":
            module = self.captured.module(str(node.target))
            # A module without parameters that could not be traced: DropPath and its like.
            named = type(module).__name__ in ("DropPath", "StochasticDepth")
            return isinstance(module, TRANSPARENT) or named
        return function_name(node) in HANDED_ON


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


def _sources(nodes: list[Node]) -> set[Node]:
    inside = set(nodes)
    return {
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    }


def _layer_tail(name: str, module: nn.Module) -> Tail | None:
    """Return the tail that a single layer of one dense map is."""
    if len(linear_maps(module)) != 1 or linear_maps(module)[0].parameter != "weight":
        return None
    bias = TensorRef(name, "bias") if getattr(module, "bias", None) is not None else None
    return Tail("weight", TensorRef(name, "weight"), bias)


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
            tail = _layer_tail(f"{below}.{last}", layer)
            assert tail is not None
            layers = dict.fromkeys([*_weights_inside(captured, f"{below}.{first}"), tail.weight])
            yield Residual(below, (tail,), tuple(layers))
