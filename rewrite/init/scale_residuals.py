"""What residual-aware initialization does to the branches that the graph shows."""

from __future__ import annotations

import math

from rewrite.graph.captured import TensorRef
from rewrite.graph.editable import Editable
from rewrite.init.residual import Residual, residual_branches
from rewrite.init.residual_tails import Tail
from rewrite.outcomes import Change
from rewrite.weights.assign import assign

_ZEROING = ("zero", "fixup")


def scale_residuals(
    captured: Editable, kind: str, allowed: set[str], notes: dict[str, list[str]]
) -> list[Change]:
    """Zero or scale the tail of every residual branch; return a change for each tail of its own.

    A tail whose module is a site already is noted there; a learned scale (LayerScale) that no
    scheme drew is a change of its own. Tails that the user did not select are left alone.
    """
    branches = residual_branches(captured)
    count = sum(1 for branch in branches if branch.tails)
    done: set[TensorRef] = set()
    changes: list[Change] = []
    for branch in branches:
        if kind == "fixup":
            _shrink(captured, branch, count, allowed, notes, done)
        for tail in branch.tails:
            known = tail.weight.owner in allowed
            if tail.weight in done or not (known or tail.kind == "scale"):
                continue
            done.add(tail.weight)
            what = _scale(captured, tail, kind, count, branch.target)
            if known:
                notes.setdefault(tail.weight.owner, []).append(what)
            else:
                changes.append(Change(tail.weight.owner, tail.weight.attr, what))
    return changes


def _scale(captured: Editable, tail: Tail, kind: str, count: int, where: str) -> str:
    factor = 0.0 if kind in _ZEROING else 1 / math.sqrt(count)
    made = _multiply(captured, tail.weight, factor)
    after = f" ({made})" if made else ""
    if tail.bias is not None and kind in _ZEROING:
        _multiply(captured, tail.bias, 0.0)
    if factor == 0:
        return f"{tail.weight.attr} 0: last {tail.kind} of a residual branch of {where}{after}"
    what = f"{tail.weight.attr} times {factor:.4g}: last {tail.kind} of {count} residual branches"
    return what + after


def _shrink(
    captured: Editable,
    branch: Residual,
    count: int,
    allowed: set[str],
    notes: dict[str, list[str]],
    done: set[TensorRef],
) -> None:
    """Scale the layers before the last one of a branch, as Fixup does."""
    last = {tail.weight for tail in branch.tails}
    layers = len(branch.layers)
    if not branch.tails or layers < 2:
        return
    factor = count ** (-1 / (2 * layers - 2))
    for ref in branch.layers:
        if ref in last or ref in done or ref.owner not in allowed:
            continue
        done.add(ref)
        made = _multiply(captured, ref, factor)
        note = "; ".join(filter(None, [f"{ref.attr} times {factor:.4g} (fixup)", made]))
        notes.setdefault(ref.owner, []).append(note)


def _multiply(captured: Editable, ref: TensorRef, factor: float) -> str:
    value = captured.tensor(ref).detach().double() * factor
    module = captured.module(ref.owner)
    ties = [
        (captured.module(other.owner), other.attr)
        for other in captured.tied(ref)
        if captured.tensor(other) is captured.tensor(ref)
    ]
    return assign(captured.editor, module, ref.attr, value, ties)
