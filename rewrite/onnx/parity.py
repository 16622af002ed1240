"""Compare the outputs of two ONNX graphs, or of a graph and a reference.

    right:  |graph - exact| <= 8 (noise + eps) max |exact|     or <= the tolerance of a contract

Here are the judgement, and another graph as the reference; a PyTorch model as the reference is in
`model_parity`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rewrite.equivalence.compare import compare
from rewrite.equivalence.divergence import Divergence, carried_bounds, value_noise
from rewrite.equivalence.record import Record, Sketcher
from rewrite.equivalence.rounding import EXPLAINS
from rewrite.equivalence.verification import same_top1
from rewrite.errors import VerificationError, one_line
from rewrite.onnx.counterparts import Parting, find_parting, tied_outputs
from rewrite.onnx.feeds import feed_of
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.noise import perturbed_feed, perturbed_graph
from rewrite.onnx.report import Check
from rewrite.onnx.repro import write_repro
from rewrite.onnx.runtime import run, session
from rewrite.onnx.values import record_graph, values_of
from rewrite.onnx.vetting.made_up import Feed
from rewrite.runtime.inputs import Inputs

EPS = float(np.finfo(np.float32).eps)


@dataclass
class Parity:
    """What a comparison with a reference found.

    `tolerance` is what a contract allows instead of what the noise explains; `math.inf` measures
    only.
    """

    tolerance: float | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    max_abs: float = 0.0
    max_rel: float = 0.0
    noise: float = 0.0
    agreed: float = 0.0
    predictions: int = 0
    cosines: list[float] = field(default_factory=list)
    divergence: Divergence | None = None
    ran: int = 0
    worst: float = 0.0
    where: str = ""
    failed: list[str] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """Return what a report carries."""
        return {
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "noise": self.noise,
            "agreement": self.agreed / self.predictions if self.predictions else None,
            "cosine": min(self.cosines, default=None),
            "divergence": self.divergence,
            "notes": tuple(dict.fromkeys(self.notes)),
        }

    def add(self, name: str, exact: Any, own: Any, got: Any, rounding: float) -> bool:
        """Take one input in; return whether the graph is right on it."""
        self.ran += 1
        error = compare(exact, got, dtypes=False)
        noise = max(compare(exact, own, dtypes=False).max_rel, rounding)
        self.max_abs = max(self.max_abs, error.max_abs)
        self.max_rel = max(self.max_rel, error.max_rel)
        self.noise = max(self.noise, noise)
        if error.agreement is not None:
            self.agreed += error.agreement * error.predictions
            self.predictions += error.predictions
        if error.cosine is not None:
            self.cosines.append(error.cosine)
        ratio = error.max_rel / (noise + EPS)
        if ratio > self.worst:
            self.worst, self.where = ratio, name
        reasons = list(error.reasons)
        if error.max_rel > self.allowed(noise):
            scale = f"noise {noise:.1e}" if self.tolerance is None else f"allowed {self.tolerance}"
            reasons.append(f"{error.worst} is off by {error.max_rel:.1e}, {scale}")
        self.failed += [f"{name}: {reason}" for reason in reasons]
        return not reasons

    def allowed(self, noise: float) -> float:
        """Return how far an output may be off, relative."""
        return EXPLAINS * (noise + EPS) if self.tolerance is None else self.tolerance

    def settle(self, parting: Parting | None) -> bool:
        """Judge the first node that parts: wrong where an output is, or where it is proved.

        Returns whether it is wrong.
        """
        if parting is None:
            return False
        found = parting.divergence
        if not parting.proved and not self.failed:
            self.notes.append(
                f"node {found.node} ({found.function}) has no counterpart in the reference (the "
                f"nearest value is off by {found.error_out:.1e}); the outputs agree"
            )
            return False
        self.divergence = found
        self.failed.insert(0, f"value on the way: {found.note}")
        return True

    def sum_up(self, reference: str) -> None:
        """Turn what was gathered into checks."""
        label = f"parity with {reference}"
        found = f"{self.ran} input{'' if self.ran == 1 else 's'}, error {self.max_rel:.1e}"
        if self.tolerance is not None:
            found += f", allowed {self.tolerance:.1e}" if math.isfinite(self.tolerance) else ""
        elif self.where:
            found += f", at most {self.worst:.1f} x the noise ({self.where})"
        if self.predictions:
            found += f", {same_top1(self.agreed / self.predictions, self.predictions)}"
        if not self.failed:
            self.checks.append(Check(label, found))
        shown = self.failed[:3]
        if len(self.failed) > len(shown):
            shown[-1] += f" (and {len(self.failed) - len(shown)} more)"
        self.checks += [Check(label, reason, False) for reason in shown]


def own_noise(
    moved: OnnxFile, graph: Record, feed: Feed, sketch: Sketcher, seed: int
) -> list[float]:
    """Return how far rounding what is stored moves the graph's own values in onnxruntime.

    Its kernels round in their own way: an instance norm may lose ten times what PyTorch's does.
    """
    return value_noise(graph, record_graph(moved, perturbed_feed(feed, seed), sketch))


def end_bound(graph: Record, own: Sequence[float]) -> float:
    """Return how far long sums on the way may put the outputs off."""
    carried = carried_bounds(graph, own)
    return max((carried[number] for number in graph.outputs), default=0.0)


def against_graph(
    opened: OnnxFile,
    live: Any,
    reference: OnnxFile,
    feeds: Sequence[Feed],
    repro: str | Path | None,
    seed: int,
    parity: Parity,
) -> Parity:
    """Compare a graph with another one: outputs on every input, values on the first."""
    theirs = session(reference, "disabled")
    moved = perturbed_graph(reference, seed)
    moved_live = session(moved, "disabled")
    parting: Parting | None = None
    bound, at = 0.0, feeds[0]
    for index, feed in enumerate(feeds):
        renamed = _renamed(reference, feed)
        try:
            exact = run(theirs, renamed, graph=reference.path)
            away = run(moved_live, perturbed_feed(renamed, seed), graph=reference.path)
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
        if index == 0 and parity.tolerance is None:
            parting, bound = _compare_graphs(opened, (reference, moved), feed, renamed, seed)
        ties = tied_outputs(opened, feed, got, exact, EXPLAINS * EPS)
        parity.notes += [f"input {index}: output[{i}]: ties of equal values" for i in ties]
        got = [exact[i] if i in ties else value for i, value in enumerate(got)]
        right = parity.add(f"input {index}", exact, away, got, bound)
        if not right and parting is None and parity.tolerance is None:
            parting, _ = _compare_graphs(opened, (reference, moved), feed, renamed, seed)
            at = feed
    if parity.settle(parting) and parting is not None and repro is not None:
        name = _output_of(reference, parting)
        values = dict(values_of(reference, _renamed(reference, at), [name])) if name else {}
        write_repro(repro, opened, at, parting.divergence, values.get(name))
    parity.sum_up(str(reference.path))
    return parity


def _compare_graphs(
    opened: OnnxFile, references: tuple[OnnxFile, OnnxFile], feed: Feed, renamed: Feed, seed: int
) -> tuple[Parting | None, float]:
    """Compare every value; `references` are a graph and itself with what is stored moved.

    The second that is returned is how far long sums of both may put the outputs off.
    """
    reference, moved = references
    sketch = Sketcher(seed)
    base = record_graph(reference, renamed, sketch, bounds=True)
    graph = record_graph(opened, feed, sketch, bounds=True)
    theirs = own_noise(moved, base, renamed, sketch, seed)
    noise = [max(value, EPS / 4) for value in theirs]
    own = own_noise(perturbed_graph(opened, seed), graph, feed, sketch, seed)
    return find_parting(graph, base, noise, own), max(
        end_bound(base, theirs), end_bound(graph, own)
    )


def _output_of(reference: OnnxFile, parting: Parting) -> str:
    """Return the name of the value that a recorded node makes, "" without one."""
    for node in reference.model.graph.node if parting.call is not None else ():
        if parting.call is not None and parting.call.owner in (node.name, node.output[0]):
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
