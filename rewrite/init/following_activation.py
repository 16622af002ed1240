"""The activation that follows a layer, whatever stands between them.

From a layer's output onward through norms, dropout, pooling, reshapes and additions, up to the
first activation or the next layer on every path. Where paths end in several activations, the one
with the largest gain counts: it is the one that takes most of the signal away.
"""

from __future__ import annotations

from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.graph.operators import Activation, activation_of, norm_of
from rewrite.graph.traits import Trait, operation
from rewrite.init.gains import activation_names, gain
from rewrite.init.residual_tails import hands_on


def following_activation(captured: Captured, calls: tuple[Node, ...]) -> Activation | None:
    """Return the activation after these calls of a layer, or None if there is none."""
    found: list[Activation] = []
    waiting = list(calls)
    seen = set(waiting)
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if (activation := activation_of(captured, user)) is not None:
                found.append(activation)
            elif _passes(captured, user):
                waiting.append(user)
    known = [a for a in found if a.name in activation_names()]
    return max(known, key=activation_gain, default=None)


def activation_gain(activation: Activation | None) -> float:
    """Return the gain for an activation that was found in a graph; 1 for none."""
    if activation is None or activation.name not in activation_names():
        return 1.0
    slope = activation.negative_slope
    return gain(activation.name, 0.01 if slope is None else slope)


def _passes(captured: Captured, node: Node) -> bool:
    if norm_of(captured, node) is not None:
        return True
    row = operation(node)
    if row is not None and (row.name == "add" or Trait.JOINS in row.traits):
        return True
    return hands_on(captured, node)
