"""Give each channel of a clipping activation a bound of its own; the function stays.

    min(max(x, 0), c)  →  min(max(x, 0), b),   b = (c, …, c)

One bound for all channels lets no scale pass. With a bound a channel it does, exactly:

    min(max(d x, 0), d b) = d min(max(x, 0), b)          for d > 0

so that `Rebalance` may scale the channels of a ReLU6, and no value is clipped that was not clipped
before: cross-layer equalization (Nagel et al. 2019, https://arxiv.org/abs/1906.04721) replaces
ReLU6 by ReLU, which is another function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from rewrite.affine.channel_map import ChannelMap
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.graph.effects import writes
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.rescaling.clipped import Clip, clips
from rewrite.rescaling.scales import Scales
from rewrite.weights.constant_recipe import ConstantRecipe


@dataclass(frozen=True)
class Bounded:
    """A clip and the shape of its bounds."""

    clip: Clip
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ClipChannels(Pass):
    """Replace ReLU6, Hardtanh from 0 and clamp from 0 by a clip with a bound a channel.

    Rewrites:
      1. Modules and function calls whose input has its channels where a convolution, a linear
         layer or a norm wrote them. The bounds are a new buffer.

    Declines: calls whose channels are not followed; one module that is called on values of
    different channels; a call that writes in place what is read again; lines that cannot be edited.
    """

    name: ClassVar[str] = "clip-channels"
    contract: ClassVar[Contract] = Contract.EXACT

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every clipping activation that is 0 below 0, in data-flow order."""
        found = clips(captured)
        scales = Scales(captured, frozenset(node for clip in found for node in clip.nodes))
        for clip in found:
            shape, reason = _shape(captured, scales, clip)
            if reason:
                yield Skip(clip.target, clip.what, reason)
            else:
                yield Site(clip.target, clip.what, clip.nodes[0], Bounded(clip, shape))

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one activation."""
        plan: Bounded = site.plan
        like, tensor = next(
            (name, p) for name, p in captured.model.named_parameters() if p.is_floating_point()
        )
        bound = torch.full(plan.shape, plan.clip.high, dtype=tensor.dtype, device=tensor.device)
        name = plan.clip.bound(captured, bound)
        key = f"{name}.bound"
        exact = torch.full(plan.shape, plan.clip.high, dtype=torch.float64, device=tensor.device)
        captured.keep_exact({key: lambda: exact})
        recipe = ConstantRecipe(key, plan.clip.high, plan.shape, like)
        after = f"a clip with {bound.numel()} bounds, {name}"
        return Change(site.target, site.before, after, touched=(name,), recipe=recipe.to_data())


def _shape(captured: Captured, scales: Scales, clip: Clip) -> tuple[tuple[int, ...], str]:
    """Return the shape of the bounds, or why there are none."""
    if clip.refusal:
        return (), clip.refusal
    shapes = set()
    for node in clip.nodes:
        lies = scales.channels(node)
        if lies is None or lies.axis >= 0 or lies.spread:
            return (), "how its channels lie is unknown (pass example_inputs)"
        shapes.add(_aligned(lies))
        if (reader := _reads_later(captured, node)) is not None:
            return (), f"it writes in place, and {reader.name} reads its input later (out-of-place)"
    if len(shapes) > 1:
        return (), "its calls see different channels"
    return shapes.pop(), ""


def _aligned(lies: ChannelMap) -> tuple[int, ...]:
    return (len(lies.index), *(1,) * (-lies.axis - 1))


def _reads_later(captured: Captured, node: Node) -> Node | None:
    """Return what reads the memory that a call writes in place, after it; None if nothing does."""
    for written in writes(captured, node):
        for reader, _ in captured.effects.memory(node).later_readers(node, written):
            return reader
    return None
