"""Folding: a norm in eval mode is an affine map per channel, and other layers take it up.

    y = (x - mean) / sqrt(var + eps) * weight + bias = s.x + t,   s = weight / sqrt(var + eps)

    W*x + b, then s, t     ->   (s.W)*x + (s.b + t)
    s, t, then W*x + b     ->   (W.s)*x + (b + W*t)     where padding adds no zeros, or t = 0

Everything is computed in float64 and rounded once. What cannot be moved exactly stays, with the
reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.fx import GraphModule

from rewrite.absorb import Ledger
from rewrite.absorption import Refusal, write_tensor
from rewrite.capture import Captured
from rewrite.edit import Editor
from rewrite.folding import Fold, Folder
from rewrite.protocol import Change, Contract, Pass, Site, Skip
from rewrite.sources import Source, sources


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Move the affine map of every norm that algebra allows into its neighbours.

    Rewrites:
      1. BatchNorm in eval mode (modules, subclasses, functional calls): into the convolutions and
         linear layers before it, or into all those behind it; the norm goes.
      2. Norm behind norm: the second is taken up by the first.
      3. Multiplications and additions by a constant per channel (LayerScale, FrozenBatchNorm2d).
      4. The weight and bias of LayerNorm, GroupNorm and RMSNorm: into all layers that read it; the
         norm stays, without them.

    Declines: norms in training mode or without running statistics; values that something else
    reads; a shift in front of zero padding; operations that do not commute with a map per channel;
    shared layers where the map is not at every call; hooks and parametrizations.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    compensate: bool = field(
        default=False,
        metadata={"help": "let other readers of a value take up the inverse map"},
    )

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every norm and constant in data-flow order; the plan of a site is its fold."""
        return self._decide(captured, None)[0]

    def _decide(
        self, captured: Captured, wanted: set[Source] | None
    ) -> tuple[list[Site | Skip], Ledger]:
        folder = Folder(captured, self.compensate)
        found: list[Site | Skip] = []
        for source in sources(folder.planner):
            outcome = folder.decide(source)
            if isinstance(outcome, Refusal):
                found.append(Skip(source.target, source.before, outcome.reason))
            else:
                found.append(Site(source.target, source.before, source.first[0], outcome))
        return found, folder.ledger

    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Fold one site."""
        return self.rewrite_all(captured, [site])[0]

    def rewrite_all(
        self, captured: Captured, sites: Sequence[Site], calibration: Any = None
    ) -> list[Change]:
        """Fold all sites: each layer's new weight is computed once, from all that it takes up."""
        nodes = {site.node for site in sites}
        folder = Folder(captured, self.compensate)
        folds: list[Fold] = []
        for source in list(sources(folder.planner)):
            if source.first[0] in nodes:
                outcome = folder.decide(source)
                if isinstance(outcome, Fold):
                    folds.append(outcome)
        editor = captured.editor
        folder.ledger.write(lambda layer, attr, new: write_tensor(editor, layer, attr, new))
        return [_remove(captured, editor, fold) for fold in folds]


def _remove(captured: Captured, editor: Editor, fold: Fold) -> Change:
    """Take the folded norm, or its affine part, out of the model."""
    source = fold.source
    keys = _keys(captured, source)
    if source.kind == "gain":
        _drop_gain(captured, editor, source)
    else:
        _bypass(captured, editor, source)
    into = ", ".join(fold.layers)
    what = "its affine part folded" if source.kind == "gain" else "folded"
    return Change(
        source.target, source.before, f"{what} into {into}" if into else "removed: it did nothing",
        touched=fold.layers, keys=keys,
    )  # fmt: skip


def _bypass(captured: Captured, editor: Editor, source: Source) -> None:
    nodes = source.nodes
    if not source.constants:
        in_graphs = [isinstance(captured.module(captured.owner(n)), GraphModule) for n in nodes]
        nodes = nodes if all(in_graphs) else nodes[:1]
    for node in nodes:
        editor.bypass(node)


def _drop_gain(captured: Captured, editor: Editor, source: Source) -> None:
    """Put a norm without weight and bias, otherwise the same, in place of one that has them."""
    old = captured.module(source.target)
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    for key in ("weight", "bias"):
        if key in new._parameters:
            new._parameters[key] = None
    for flag in ("affine", "elementwise_affine"):
        if hasattr(new, flag):
            setattr(new, flag, False)
    editor.replace(source.target, new)


def _keys(captured: Captured, source: Source) -> dict[str, str | None]:
    """Return the state-dict keys that go with the source."""
    if source.constants:
        roots = [c.root for c in source.constants if c.root is not None]
        return dict.fromkeys(roots)
    assert source.layer is not None
    refs = (source.layer.weight, source.layer.bias, source.layer.mean, source.layer.var)
    keys: dict[str, str | None] = {ref.name: None for ref in refs if ref is not None}
    module: nn.Module = captured.module(source.target)
    if source.kind == "norm" and "num_batches_tracked" in module._buffers:
        keys[f"{source.target}.num_batches_tracked"] = None
    return keys
