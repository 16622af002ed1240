"""LayerNorm to RMSNorm: where a stream is centred, subtracting its mean does nothing.

    LN(x) = w (x - mean(x)) / sqrt(var(x) + eps) + b = RMS(C x),    C = I - 11'/d

    y = W h + c  ->  (C W) h + C c        every writer of the stream: then x = C x everywhere

Exact for pre-norm streams: every writer is linear, every reader a LayerNorm (Jiang et al. 2023,
"Pre-RMSNorm and Pre-CRMSNorm Transformers"). In training, dropout un-centres what a writer adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.nn import Centre, ShiftedRMSNorm
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.streams.centre import CentrePlanner, centred
from rewrite.streams.execute import carry_out
from rewrite.streams.outcomes import stream_outcomes
from rewrite.streams.plan import StreamOptions


@dataclass(frozen=True)
class LayerNormToRMSNorm(Pass):
    """Centre every writer of a residual stream, and make the LayerNorms that read it RMSNorms.

    Rewrites, one site a stream:
      1. Embeddings, positions and class tokens: centred row by row.
      2. The output projections of attention and MLP, and their biases; a layer scale behind them is
         absorbed first, and becomes one.
      3. Every LayerNorm that reads the stream: an RMSNorm of the same epsilon, with its weight, and
         with its bias where that is not zero. Fold first, and neither is left.

    Declines: streams that anything but LayerNorms reads; writers that nothing can centre: a norm
    (BERT's, and those behind BLOOM's and CLIP's embedding), an activation (Whisper's); an embedding
    that a head shares, without `untie`; streams that the model returns; norms of another class.
    """

    name: ClassVar[str] = "ln-to-rms"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    centre: bool = field(
        default=False,
        metadata={"help": "put a module that centres behind a norm that writes to the stream"},
    )
    untie: bool = field(
        default=False,
        metadata={"help": "give a head that shares its weight with the embedding its own"},
    )
    strict_outputs: bool = field(
        default=False,
        metadata={"help": "leave a stream alone that another call would return"},
    )

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every residual stream that a LayerNorm reads."""
        if not any(isinstance(m, nn.LayerNorm) for m in captured.model.modules()):
            return
        options = StreamOptions(self.untie, self.strict_outputs, self.centre)
        yield from stream_outcomes(captured, CentrePlanner, options)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Centre one stream and exchange its norms."""
        plan = site.plan.plan
        change = carry_out(captured, plan, {"kind": "centre"}, site.before, centred(plan))
        keys, needs = dict(change.keys), dict(plan.needs)
        for name in plan.norms:
            if _exchange(captured, name):
                places = (name, *captured.aliases(name))
                keys.update({f"{place}.bias": None for place in places})
                needs[f"{name}.bias"] = 0.0
        for name in plan.inserted:
            old = captured.module(name)
            places = (name, *captured.aliases(name))
            keys |= {f"{p}.{key}": f"{p}.0.{key}" for p in places for key in old.state_dict()}
            captured.editor.replace(name, nn.Sequential(old, Centre()))
        return replace(change, keys=keys, recipe={**change.recipe, "needs": needs})


def _exchange(captured: Editable, name: str) -> bool:
    """Put an RMSNorm in place of a LayerNorm; return whether its bias went."""
    old = captured.module(name)
    assert isinstance(old, nn.LayerNorm)
    shifted = old.bias is not None and _may_be_nonzero(captured.values(TensorRef(name, "bias")))
    new: nn.Module
    if shifted:
        new = ShiftedRMSNorm(old.normalized_shape[0], old.eps)
        captured.editor.share(new, "bias", old.bias)
    else:
        new = nn.RMSNorm(
            old.normalized_shape, eps=old.eps, elementwise_affine=old.weight is not None
        )
    if old.weight is not None:
        captured.editor.share(new, "weight", old.weight)
    elif shifted:
        captured.editor.write(new, "weight", torch.ones_like(old.bias))
    captured.editor.replace(name, new)
    return old.bias is not None and not shifted


def _may_be_nonzero(bias: torch.Tensor) -> bool:
    return bias.device.type == "meta" or bool(bias.any())
