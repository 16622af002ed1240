"""What can be folded: calls whose value is a per-channel affine map of their input.

norm       y = (x - mean) / sqrt(var + eps) * weight + bias     in eval mode
gain       y = n(x) * weight + bias                             the affine part of another norm
constant   y = x * c,  y = x + c                                LayerScale, FrozenBatchNorm2d
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.fx import Node

from rewrite.affine.algebra import Affine
from rewrite.affine.constants import ChannelConstant, Constants
from rewrite.affine.layers import Layer
from rewrite.affine.ledger import Ledger
from rewrite.affine.planner import Planner
from rewrite.graph.operators import Norm, norm_of
from rewrite.graph.spellings import function_name
from rewrite.outcomes import Declined
from rewrite.weights.baking import has_old_hooks


@dataclass(frozen=True, eq=False)
class Source:
    """One affine map to fold.

    Attributes:
        kind: "norm", "gain" or "constant", as in the module's docstring; "input" is preprocessing.
        target: the qualified name to report.
        before: what stands there, in a few words.
        first, last: per call, the node that reads x and the node whose value is y.
        axis: of the channels in x.
        layer: the norm as a layer; None for a constant.
        refusal: why it cannot be folded whatever surrounds it, or "".
    """

    kind: Literal["norm", "gain", "constant", "input"]
    target: str
    before: str
    first: tuple[Node, ...]
    last: tuple[Node, ...]
    axis: int
    layer: Layer | None
    refusal: str = ""
    constants: tuple[ChannelConstant, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that the map consists of."""
        if self.constants:
            return tuple(constant.node for constant in self.constants)
        return self.first

    @property
    def inputs(self) -> dict[Node, Node]:
        """The value that each first node maps."""
        if self.constants:
            return {self.constants[0].node: self.constants[0].operand}
        return {node: node.all_input_nodes[0] for node in self.first if node.all_input_nodes}

    @property
    def passes_on(self) -> dict[Node, Node]:
        """What each node passes on once the map is gone."""
        if self.constants:
            return {constant.node: constant.operand for constant in self.constants}
        return self.inputs

    def affine(self, ledger: Ledger) -> Affine:
        """Return the map, with everything that the norm itself has absorbed so far."""
        if self.layer is not None:
            return ledger.affine(self.layer)
        result = self.constants[0].affine
        for constant in self.constants[1:]:
            result = constant.affine.after(result)
        return result


def sources(planner: Planner) -> Iterator[Source]:
    """Yield every candidate of a captured model, in data-flow order, each layer once."""
    captured = planner.captured
    constants = Constants(captured, planner.context.ranks)
    seen: set[Node] = set()
    lent: set[str] = set()
    for node in captured.nodes():
        if node in seen or node.op not in ("call_module", "call_function", "call_method"):
            continue
        norm = norm_of(captured, node)
        if norm is not None:
            calls = captured.call_sites(node)
            seen.update(calls)
            if norm.module is None:
                lent |= {r.owner for r in (norm.running_mean, norm.weight) if r is not None}
            elif norm.module in lent and captured.region_of(node).name == norm.module:
                continue  # nothing calls it: its tensors were met with the line that takes them
            yield _norm_source(planner, norm, calls)
            continue
        constant = constants.at(node)
        if isinstance(constant, Declined):
            calls = captured.call_sites(node)
            seen.update(calls)
            yield _declined_source(planner, constants, calls, constant)
        elif constant is not None:
            chain = _chain(planner, constants, constant)
            seen.update(link.node for link in chain)
            yield _constant_source(planner, chain)


def _norm_source(planner: Planner, norm: Norm, calls: tuple[Node, ...]) -> Source:
    layer = planner.layer(norm.node)
    kind: Literal["norm", "gain"] = "norm" if layer is not None and layer.kind == "norm" else "gain"
    if norm.kind == "batch":
        kind = "norm"
    return Source(
        kind, norm.target, describe(planner, norm), calls, calls, norm.channel_axis, layer,
        _norm_refusal(planner, norm, layer, calls),
    )  # fmt: skip


def _norm_refusal(
    planner: Planner, norm: Norm, layer: Layer | None, calls: tuple[Node, ...]
) -> str:
    captured = planner.captured
    if norm.module is not None:
        if (altered := captured.unsteady(norm.module)) is not None:
            return altered
        old = has_old_hooks(captured.module(norm.module))
        hooks = captured.hooks(norm.module) if old else ()
        if reason := hooks[0] if hooks else planner.more_than_a_layer(norm.module):
            return f"{reason}: its call is more than a normalization"
        code = captured.code
        if (chosen := code.chosen(norm.module)) is not None:
            return chosen
        if (caller := captured.unknown_caller(norm.module)) is not None:
            return caller
        goes = norm.kind == "batch" and norm.node.op == "call_module"
        if goes and (held := code.exchanged(norm.module)) is not None:
            return held
    if norm.kind == "batch":
        if norm.running_mean is None or norm.running_var is None:
            return (
                "has no running statistics: it normalizes by those of its batch, also in eval mode"
            )
        if norm.training:
            return "is in training mode: it normalizes by the statistics of its batch (call eval())"
    if layer is None:
        return "has no affine part, and its statistics depend on the input"
    if (reader := planner.reader(layer, calls)) is not None:
        return reader
    if layer.mean is not None and captured.numbers is None and captured.tensor(layer.mean).is_meta:
        return "has no values (it is on the meta device)"
    return ""


def _chain(
    planner: Planner, constants: Constants, constant: ChannelConstant
) -> tuple[ChannelConstant, ...]:
    """Return `constant` with those behind it that belong to the same forward: x * c + d."""
    captured = planner.captured
    chain = [constant]
    while True:
        node = chain[-1].node
        users = tuple(node.users)
        if len(users) != 1 or captured.frame(users[0]) != captured.frame(node):
            return tuple(chain)
        after = constants.channel_constant(users[0])
        if after is None or after.operand is not node or after.axis != constant.axis:
            return tuple(chain)
        chain.append(after)


def _constant_source(planner: Planner, chain: tuple[ChannelConstant, ...]) -> Source:
    captured = planner.captured
    node = chain[0].node
    owner = captured.owner(node)
    kind = type(captured.module(owner)).__name__
    root = chain[0].root if len(chain) == 1 else None
    operation = " ".join(str(getattr(link.node.target, "__name__", "")) for link in chain)
    first, last = captured.call_sites(node), captured.call_sites(chain[-1].node)
    refusal = "" if len(first) == 1 else "is called more than once"
    for link in chain:
        if not refusal:
            refusal = captured.lines.refusal(link.node) or ""
    target = owner if kind in ("LayerScale", "LayerScale2d", "FrozenBatchNorm2d") else root or owner
    return Source(
        "constant", target, f"{operation} by a constant per channel", first, last, chain[0].axis,
        None, refusal, chain,
    )  # fmt: skip


def _declined_source(
    planner: Planner, constants: Constants, calls: tuple[Node, ...], declined: Declined
) -> Source:
    """Return a line that combines a value and a constant in a way that is not folded."""
    name = function_name(calls[0]) or str(calls[0].target)
    values = [node for node in calls[0].all_input_nodes if constants.value(node) is not None]
    made_of = {root for node in values for root in constants.roots(node)}
    target = made_of.pop() if len(made_of) == 1 else planner.captured.owner(calls[0])
    return Source(
        "constant", target, f"{name} by a constant", calls, calls, 0, None, declined.reason,
    )  # fmt: skip


def describe(planner: Planner, norm: Norm) -> str:
    """Return a norm in a few words: "BatchNorm2d(64)"."""
    if norm.module is not None:
        module: nn.Module = planner.captured.module(norm.module)
        name = type(module).__name__.removeprefix("Parametrized")
    else:
        name = getattr(norm.node.target, "__name__", "batch_norm")
    return f"{name}({norm.num_features})"
