"""Find the first module or operation at which two models diverge.

A value *agrees* if the other model computes it, too, anywhere. Rewrites move values on purpose
(after a fold the convolution's output is the old norm's), so a value that disagrees is not an error
by itself, as long as everything computed from it agrees again. Hence

    divergent = calls whose inputs all agree and from which a path of values that all disagree
             leads to an output

found by walking back from the outputs over disagreeing values only. Branches that agree are not on
such a path. Both models are searched: an activation that was lost is only visible in the original,
one that was added only in the rewritten model.

A clamp may compute equal values from different ones (a channel below zero under a ReLU). It only
masks the difference, which therefore counts as one that reaches an output.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.equivalence.record import Event, Key, Known, Near, Record, Sketch, Sketcher, record
from rewrite.equivalence.rounding import EXPLAINS
from rewrite.runtime.control_flow import branches_in_python
from rewrite.runtime.inputs import Inputs, seeded

AGREES = 1e-11


RECONVERGED = 4.0
"""A value agrees again within this many times its noise; it is wrong beyond `EXPLAINS` times."""


SHARPLY = 8.0
"""By what factor the distance falls from one call to the next where values agree again."""


CLAMPS = frozenset({
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "threshold", "clamp", "clamp_min",
    "clamp_max", "maximum", "minimum", "clip",
})  # fmt: skip
"""Functions that return one value for a whole range: they can hide what parts two models."""


_SUMS = ("add", "sub")


@dataclass(frozen=True)
class Divergence:
    """The first call at which two models diverge.

    Attributes:
        target: the qualified name of the module that made the call.
        function: the name of the function that was called.
        source: the line of code in the original, if known.
        source_after: the line of code in the other model.
        error_in: the largest relative error of the call's inputs.
        error_out: the relative error of its output; infinite if it has no counterpart.
        rewrite: the pass that changed the module, "" if none did.
        node: the node of an ONNX graph, "" in PyTorch.
        note: a remark, "" for none.
    """

    target: str
    function: str
    source: str | None
    source_after: str | None
    error_in: float
    error_out: float
    rewrite: str = ""
    node: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON's own types."""
        finite = self.error_out < float("inf")
        return {**vars(self), "error_out": self.error_out if finite else None}

    def __str__(self) -> str:
        where = self.target or "the model's own forward"
        touched = f", rewritten by {self.rewrite}" if self.rewrite else ""
        lines = [
            f"  first diverging call: {where} ({self.function}{touched}): "
            f"error {self.error_in:.1e} in, {self.error_out:.1e} out"
        ]
        lines += [f"    original: {self.source}"] if self.source else []
        lines += [f"    rewritten: {self.source_after}"] if self.source_after else []
        lines += [f"    {self.note}"] if self.note else []
        return "\n".join(lines)


def recorded(
    model: nn.Module, inputs: Inputs, sketch: Sketcher, seed: int = 0, keep: Key | None = None
) -> tuple[Record, Any]:
    """Run a model whose tensors are float64 already; return its record and its output."""
    own = inputs.clone()
    with seeded(seed), torch.no_grad(), branches_in_python():
        return record(model, own.args, own.kwargs, sketch, keep)


def value_noise(original: Record, perturbed: Record) -> list[float]:
    """Return the relative change of each value of the original when parameters are rounded.

    A value with few elements may change little by chance, so the noise of a call's output is taken
    as at least half that of its inputs. A known bound of a value (for a long sum) is carried on to
    the values computed from it.
    """
    if len(original.values) != len(perturbed.values):
        return [max(map(Sketch.distance, original.values, perturbed.values), default=0.0)] * len(
            original.values
        )
    noise = list(map(Sketch.distance, original.values, perturbed.values))
    for event in original.events:
        for made in event.outputs:
            came_in = (noise[n] * _share(original, event, n, made) for n in event.inputs)
            noise[made] = max(noise[made], max(came_in, default=0.0) / 2)
    return list(map(max, noise, carried_bounds(original, noise)))


def carried_bounds(record: Record, noise: Sequence[float]) -> list[float]:
    """Return the error bound of each value: its own, or that carried over from its inputs."""
    bounds = [record.bounds.get(number, 0.0) for number in range(len(record.values))]
    for event in record.events if record.bounds else ():
        came_in = max((noise[number] for number in event.inputs), default=0.0)
        for made in event.outputs:
            kept = min(1.0, noise[made] / came_in) if came_in else 1.0
            for given in event.inputs:
                left = min(kept, _share(record, event, given, made))
                bounds[made] = max(bounds[made], bounds[given] * left)
    return bounds


def _share(record: Record, event: Event, given: int, made: int) -> float:
    """Return the largest factor by which a call passes on an input's relative error.

    In a sum it is the norm of the term relative to that of the sum: the mean of nearly centered
    data may have a relative error of 1 and hardly change what it is subtracted from.
    """
    term, total = record.values[given], record.values[made]
    if event.function.lower().strip("_").lstrip("ri") not in _SUMS or not total.norm:
        return 1.0
    return min(1.0, term.norm * math.sqrt(total.count / max(1, term.count)) / total.norm)


def compare_records(
    a: Record, b: Record, noise: Sequence[float] = (), touched: Collection[str] = ()
) -> Divergence | None:
    """Return the first divergence of two runs, None if their outputs agree.

    Args:
        a: the run of the original.
        b: the run of the rewritten model, on the same input.
        noise: the relative error that rounding explains for each value of `a`; () for none.
        touched: names of rewritten modules; a mapping gives the pass of each.
    """
    known_a, known_b = Known(a.values, noise), Known(b.values)
    found_a = [known_b.nearest(value) for value in a.values]
    if noise:
        found_a = [near._replace(noise=own) for near, own in zip(found_a, noise, strict=True)]
    found_b = [known_a.nearest(value) for value in b.values]
    first_a = first_divergent(a, found_a, masked(a, found_a, b, found_b))
    first_b = first_divergent(b, found_b, masked(b, found_b, a, found_a))
    chosen = _earlier(a, b, first_a, first_b)
    if chosen is None:
        return None
    return _describe(a, b, chosen, known_b if chosen is first_a else known_a, touched)


def first_divergent(
    subject: Record, nearest: Sequence[Near], masked: Set[int] = frozenset()
) -> Event | None:
    """Return the first divergent call of `subject`, None if there is none.

    Args:
        subject: the record of one model.
        nearest: for each of its values the nearest value of the other model.
        masked: values that disagree, but are hidden by a clamp.
    """
    ratio = [_ratio(near) for near in nearest]
    lasting = _lasting(subject, ratio, masked)
    for event in subject.events:
        if any(ratio[number] > EXPLAINS for number in event.inputs):
            continue
        if any(ratio[number] > EXPLAINS and lasting[number] for number in event.outputs):
            return event
    return None


def masked(
    subject: Record, nearest: Sequence[Near], other: Record, theirs: Sequence[Near]
) -> set[int]:
    """Return the values of `subject` that disagree, but become equal by a clamp."""
    numbers: set[int] = set()
    for event in subject.events:
        for made in event.outputs if is_clamp(event) else ():
            producer = other.producer[nearest[made].number or 0]
            if _ratio(nearest[made]) > RECONVERGED or producer is None:
                continue
            there = other.events[producer]
            apart = [number for number in event.inputs if _ratio(nearest[number]) > EXPLAINS]
            if is_clamp(there) and any(_ratio(theirs[n]) > EXPLAINS for n in there.inputs):
                numbers.update(apart)
    return numbers


def is_clamp(event: Event) -> bool:
    """Return whether a call may map different inputs to equal outputs, as a ReLU does."""
    return event.function.lower().strip("_") in CLAMPS


def _ratio(near: Near) -> float:
    """Return a distance divided by its noise; 0 for no distance, inf without noise."""
    if near.distance <= AGREES:
        return 0.0
    return near.distance / near.noise if near.noise else float("inf")


def _lasting(subject: Record, ratio: Sequence[float], masked: Set[int]) -> list[bool]:
    """Return for each value whether it disagrees on some whole path to an output.

    A path agrees again where the distance drops sharply, as at the end of a rewrite. A distance
    that only falls below a growing noise still counts.
    """
    lasting = [False] * len(ratio)
    readers: dict[int, list[Event]] = {}
    for event in subject.events:
        for number in event.inputs:
            readers.setdefault(number, []).append(event)
    outputs = set(subject.outputs)
    for number in reversed(range(len(ratio))):
        if ratio[number] <= RECONVERGED:
            continue
        lasting[number] = (
            number in outputs
            or number in masked
            or any(
                lasting[made] or ratio[number] / SHARPLY < ratio[made] <= RECONVERGED
                for event in readers.get(number, ())
                for made in event.outputs
            )
        )
    return lasting


def _earlier(a: Record, b: Record, in_a: Event | None, in_b: Event | None) -> Event | None:
    """Choose between the divergent call of the original and that of the rewritten model."""
    if in_a is None or in_b is None:
        return in_a or in_b
    if in_a.owner == in_b.owner:
        return in_b
    keys_a, keys_b = a.by_key(), b.by_key()
    if in_b.owner not in {event.owner for event in a.events}:
        # A new module stands for what is gone beside it; what is gone elsewhere got lost.
        beside = in_a.owner.startswith(in_b.owner.rpartition(".")[0])
        return in_b if beside or in_a.key in keys_b else in_a
    if in_a.key not in keys_b:
        return in_a
    if in_b.key not in keys_a:
        return in_b
    order = {event.key: index for index, event in enumerate(a.events)}
    return in_a if order[in_a.key] <= order[in_b.key] else in_b


def _describe(
    a: Record, b: Record, event: Event, other: Known, touched: Collection[str]
) -> Divergence:
    subject = a if event in a.events else b
    before, after = a.by_key().get(event.key), b.by_key().get(event.key)
    note = ""
    if before is None:
        note = f"the original has no such call of {event.function}"
    elif after is None:
        note = f"the rewritten model has no such call of {event.function}"
    error_out = float("inf")
    if before is not None and after is not None:
        pairs = zip(before.outputs, after.outputs, strict=False)
        error_out = max((a.values[i].distance(b.values[j]) for i, j in pairs), default=error_out)
    return Divergence(
        target=event.owner,
        function=event.function,
        source=before.source if before else None,
        source_after=after.source if after else None,
        error_in=max(
            (other.nearest(subject.values[i]).distance for i in event.inputs), default=0.0
        ),
        error_out=error_out,
        rewrite=_rewritten_by(event.owner, touched),
        note=note,
    )


def _rewritten_by(name: str, touched: Collection[str]) -> str:
    """Return the pass that rewrote a module, or else the innermost module around it."""
    for candidate in sorted(touched, key=len, reverse=True):
        if name == candidate or (candidate and name.startswith(f"{candidate}.")):
            return touched[candidate] if isinstance(touched, Mapping) else "a pass"
    return ""
