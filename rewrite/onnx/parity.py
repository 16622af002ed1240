"""Compare what an ONNX graph computes with what it should, output by output and value by value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.equivalence.compare import compare
from rewrite.equivalence.divergence import (
    Divergence,
    first_divergent,
    masked,
    recorded,
    value_noise,
)
from rewrite.equivalence.equality import original_takes, run_original
from rewrite.equivalence.record import Event, Known, Record, Sketch, Sketcher
from rewrite.equivalence.rounding import EXPLAINS, all_rounding, perturbed
from rewrite.equivalence.verification import Level
from rewrite.errors import VerificationError, one_line
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.report import Check
from rewrite.onnx.repro import write_repro
from rewrite.onnx.runtime import Feed, as_array, feed_of, run, session, with_perturbed_weights
from rewrite.onnx.values import record_graph, values_of
from rewrite.runtime.float64 import in_float64, short_of_memory
from rewrite.runtime.inputs import Inputs, call, device_of
from rewrite.runtime.leaves import leaves
from rewrite.runtime.modes import isolated, widen

_EPS = torch.finfo(torch.float32).eps


@dataclass
class Parity:
    """What a comparison with a reference found."""

    checks: list[Check] = field(default_factory=list)
    max_abs: float = 0.0
    max_rel: float = 0.0
    noise: float = 0.0
    agreements: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    divergence: Divergence | None = None
    ran: int = 0
    worst: float = 0.0
    where: str = ""
    failed: list[str] = field(default_factory=list)
    failing: Any = None

    def numbers(self) -> dict[str, Any]:
        """Return what a report carries."""
        mean = sum(self.agreements) / len(self.agreements) if self.agreements else None
        return {
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "noise": self.noise,
            "agreement": mean,
            "cosine": min(self.cosines, default=None),
            "divergence": self.divergence,
        }

    def add(self, name: str, exact: Any, own: Any, got: Any, rounding: float) -> bool:
        """Take one input in; return whether the graph is right on it."""
        self.ran += 1
        error = compare(exact, got, dtypes=False)
        noise = max(compare(exact, own, dtypes=False).max_rel, rounding)
        allowed = EXPLAINS * (noise + _EPS)
        self.max_abs = max(self.max_abs, error.max_abs)
        self.max_rel = max(self.max_rel, error.max_rel)
        self.noise = max(self.noise, noise)
        if error.agreement is not None:
            self.agreements.append(error.agreement)
        if error.cosine is not None:
            self.cosines.append(error.cosine)
        ratio = error.max_rel / (noise + _EPS)
        if ratio > self.worst:
            self.worst, self.where = ratio, name
        reasons = list(error.reasons)
        if error.max_rel > allowed:
            reasons.append(f"{error.worst} is off by {error.max_rel:.1e}, noise {noise:.1e}")
        self.failed += [f"{name}: {reason}" for reason in reasons]
        return not reasons

    def sum_up(self, reference: str) -> None:
        """Turn what was gathered into checks."""
        label = f"parity with {reference}"
        found = f"{self.ran} inputs, error {self.max_rel:.1e}"
        if self.where:
            found += f", at most {self.worst:.1f} x the noise ({self.where})"
        if self.agreements:
            found += f", top-1 agreement {sum(self.agreements) / len(self.agreements):.1%}"
        if not self.failed:
            self.checks.append(Check(label, found))
        shown = self.failed[:3]
        if len(self.failed) > len(shown):
            shown[-1] += f" (and {len(self.failed) - len(shown)} more)"
        self.checks += [Check(label, reason, False) for reason in shown]


def against_model(
    opened: OnnxFile,
    live: Any,
    model: nn.Module,
    cases: Sequence[tuple[str, Inputs]],
    level: Level,
    repro: str | Path | None,
    seed: int,
) -> Parity:
    """Compare a graph with a PyTorch model in eval mode: outputs on every case, values on one."""
    parity = Parity()
    rounding = all_rounding(model)
    device = device_of(model)
    for index, (name, inputs) in enumerate(cases):
        inputs = inputs.to(device)
        try:
            with isolated(model):
                native, own = _native(model, name, inputs, index, seed)
        except VerificationError:
            if not index:
                raise
            continue
        feed = feed_of(opened, inputs)
        try:
            got = run(live, feed)
        except VerificationError as error:
            parity.failed.append(f"{name}: {one_line(error)}")
            continue
        own_list, got = _paired(opened, own, got)
        first = (
            None
            if native is None
            else _First(opened, with_perturbed_weights(opened, seed), native, feed)
        )
        with in_float64(model, streamed=short_of_memory(model)):
            if first is None:
                exact = call(model, inputs.map(widen), seed)
                moved = 0.0
            else:
                exact, moved = _compare_values(first, model, inputs, rounding, parity, repro, seed)
        parity.add(name, [leaf for _, leaf in _kept(exact)], own_list, got, moved)
    parity.sum_up("the PyTorch model")
    return parity


def _kept(output: Any) -> list[tuple[str, Any]]:
    """Return the leaves of an output that an exporter keeps: tensors and numbers."""
    return [(p, v) for p, v in leaves(output) if isinstance(v, torch.Tensor | int | float)]


def _paired(opened: OnnxFile, own: Any, got: list[Any]) -> tuple[list[Any], list[Any]]:
    mine = [leaf for _, leaf in _kept(own)]
    if len(mine) != len(got):
        raise VerificationError(
            f"{opened.path}: the graph returns {len(got)} values, the PyTorch model {len(mine)}"
        )
    return mine, got


@dataclass(frozen=True)
class _First:
    """What is known of the first input: the graph, itself with every weight rounded once, and the
    values of the model in its own dtype."""

    opened: OnnxFile
    perturbed_graph: OnnxFile
    native: Record
    feed: Feed


def _native(
    model: nn.Module, name: str, inputs: Inputs, index: int, seed: int
) -> tuple[Record | None, Any]:
    """Run the model in its own dtype; of the first input return the values on the way too."""
    if index:
        return None, run_original(model, name, inputs, seed)
    with original_takes(name, inputs):
        return recorded(model, inputs, Sketcher(seed), seed)


def _compare_values(
    first: _First,
    model: nn.Module,
    inputs: Inputs,
    rounding: Any,
    parity: Parity,
    repro: str | Path | None,
    seed: int,
) -> tuple[Any, float]:
    """Compare every value on the way; return the exact output and what rounding does to it."""
    opened, feed, sketch = first.opened, first.feed, Sketcher(seed)
    wide = inputs.map(widen)
    exact_record, exact = recorded(model, wide, sketch, seed)
    with perturbed(model, rounding, seed):
        perturbed_record, moved = recorded(model, wide, sketch, seed)
    graph = record_graph(opened, feed, sketch)
    own = _own_noise(first.perturbed_graph, graph, feed, sketch)
    noise = _with_native(value_noise(exact_record, perturbed_record), exact_record, first.native)
    parity.divergence, there = _diverging(graph, exact_record, noise, own)
    if parity.divergence is not None:
        parity.failed.append(f"value on the way: {parity.divergence.note}")
        if repro is not None:
            expected = None
            if there is not None:
                again, _ = recorded(model, wide, sketch, seed, keep=there.key)
                expected = as_array(again.kept[0])
            write_repro(repro, opened, feed, parity.divergence, expected)
    ends = [own[number] for number in graph.outputs]
    return exact, max(compare(exact, moved).max_rel, *ends, 0.0)


def _with_native(noise: list[float], exact: Record, native: Record) -> list[float]:
    """Return the noise, at least that of the model's own dtype where it makes the same values."""
    own = [0.0] * len(noise)
    if len(native.values) == len(noise):
        own = list(map(Sketch.distance, exact.values, native.values))
    own = [value if math.isfinite(value) else 0.0 for value in own]
    return [max(*values, _EPS / 4) for values in zip(noise, own, strict=True)]


def _own_noise(
    perturbed_graph: OnnxFile, graph: Record, feed: Feed, sketch: Sketcher
) -> list[float]:
    """Return how far rounding each weight moves the graph's own values in onnxruntime.

    Its kernels round in their own way: an instance norm may lose ten times what PyTorch's does.
    """
    return value_noise(graph, record_graph(perturbed_graph, feed, sketch))


def _diverging(
    graph: Record, reference: Record, noise: Sequence[float], own: Sequence[float]
) -> tuple[Divergence | None, Event | None]:
    """Return the first node of `graph` that leaves the values of `reference`.

    The second is the reference's call whose value is missing in the graph.
    """
    known = Known(reference.values, noise)
    found = [known.nearest(value) for value in graph.values]
    found = [
        near._replace(noise=max(near.noise, mine)) for near, mine in zip(found, own, strict=True)
    ]
    seen = Known(graph.values)
    theirs = [
        seen.nearest(value)._replace(noise=mine)
        for value, mine in zip(reference.values, noise, strict=True)
    ]
    event = first_divergent(graph, found, masked(graph, found, reference, theirs))
    if event is None:
        return None, None
    there = first_divergent(reference, theirs, masked(reference, theirs, graph, found))
    far = max((found[number].distance for number in event.outputs), default=math.inf)
    near = max((found[number].distance for number in event.inputs), default=0.0)
    node = event.owner
    target = _target(event, there)
    divergence = Divergence(
        target=target,
        function=event.function,
        source=there.source if there is not None else None,
        source_after=None,
        error_in=near,
        error_out=far,
        node=node,
        note=f"node {node} ({event.function}) of {target or 'the graph'} is off by {far:.1e}",
    )
    return divergence, there


def _target(event: Event, there: Event | None) -> str:
    """Return the PyTorch module of a node: as the exporter noted it, else as the values tell."""
    if event.source is not None:
        return event.source
    return there.owner if there is not None else ""


def against_graph(
    opened: OnnxFile,
    live: Any,
    reference: OnnxFile,
    feeds: Sequence[Feed],
    repro: str | Path | None,
    seed: int,
) -> Parity:
    """Compare a graph with another one: outputs on every input, values on the first."""
    parity = Parity()
    theirs = session(reference, "disabled")
    perturbed_graph = with_perturbed_weights(reference, seed)
    moved_live = session(perturbed_graph, "disabled")
    for index, feed in enumerate(feeds):
        renamed = _renamed(reference, feed)
        try:
            exact = run(theirs, renamed, graph=reference.path)
            moved = run(moved_live, renamed, graph=reference.path)
        except VerificationError:
            if not index:
                raise
            continue
        try:
            got = run(live, feed)
        except VerificationError as error:
            parity.failed.append(f"input {index}: {one_line(error)}")
            continue
        if len(exact) != len(got):
            raise VerificationError(
                f"{opened.path}: returns {len(got)} values, {reference.path} {len(exact)}"
            )
        right = parity.add(f"input {index}", exact, moved, got, 0.0)
        if index == 0 or (not right and parity.divergence is None):
            parity.divergence, there = _compare_graphs(
                opened, (reference, perturbed_graph), feed, renamed, seed
            )
            if parity.divergence is None:
                continue
            parity.failed.append(f"value on the way: {parity.divergence.note}")
            if repro is not None:
                name = _output_of(reference, there)
                values = dict(values_of(reference, renamed, [name])) if name else {}
                write_repro(repro, opened, feed, parity.divergence, values.get(name))
    parity.sum_up(str(reference.path))
    return parity


def _compare_graphs(
    opened: OnnxFile, references: tuple[OnnxFile, OnnxFile], feed: Feed, renamed: Feed, seed: int
) -> tuple[Divergence | None, Event | None]:
    """Compare every value; `references` are a graph and itself with every weight rounded once."""
    reference, perturbed_graph = references
    sketch = Sketcher(seed)
    base = record_graph(reference, renamed, sketch)
    graph = record_graph(opened, feed, sketch)
    theirs = _own_noise(perturbed_graph, base, renamed, sketch)
    noise = [max(value, _EPS / 4) for value in theirs]
    own = _own_noise(with_perturbed_weights(opened, seed), graph, feed, sketch)
    return _diverging(graph, base, noise, own)


def _output_of(reference: OnnxFile, there: Event | None) -> str:
    """Return the name of the value that a recorded node makes, "" without one."""
    for node in reference.model.graph.node if there is not None else ():
        if there is not None and there.owner in (node.name, node.output[0]):
            return str(node.output[0])
    return ""


def _renamed(reference: OnnxFile, feed: Feed) -> Feed:
    """Return a feed under the reference's input names: the same ones, or by position."""
    names = [value.name for value in reference.inputs]
    if set(names) == set(feed):
        return feed_of(reference, Inputs((), feed))
    if len(names) != len(feed):
        raise VerificationError(
            f"{reference.path}: its inputs are {', '.join(names)}, not {', '.join(feed)}"
        )
    return feed_of(reference, Inputs((), dict(zip(names, feed.values(), strict=True))))
