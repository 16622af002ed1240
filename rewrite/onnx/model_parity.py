"""Compare an ONNX graph with a PyTorch model: outputs, intermediate values, other input sizes.

What the model answers is what it answers in `inference_mode`, plainly called: where PyTorch takes
another path there than the one that is traced, that is a finding. NaN and infinity are right where
the model has them in its own type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rewrite.equivalence.compare import compare
from rewrite.equivalence.divergence import recorded, value_noise
from rewrite.equivalence.equality import original_takes, run_original
from rewrite.equivalence.record import Record, Sketch, Sketcher
from rewrite.equivalence.rounding import EXPLAINS, Perturbation, all_rounding, perturbed
from rewrite.equivalence.verification import Level
from rewrite.errors import VerificationError, one_line
from rewrite.onnx.counterparts import Parting, find_parting, tied_outputs
from rewrite.onnx.feeds import Resized, as_array, as_tensor, feed_of
from rewrite.onnx.file import OnnxFile
from rewrite.onnx.noise import perturbed_feed, perturbed_graph
from rewrite.onnx.parity import EPS, Parity, end_bound, own_noise
from rewrite.onnx.report import Check
from rewrite.onnx.repro import write_repro
from rewrite.onnx.runtime import run, session
from rewrite.onnx.values import record_graph
from rewrite.onnx.vetting.made_up import Feed
from rewrite.runtime.float64 import in_float64, short_of_memory
from rewrite.runtime.inputs import Inputs, call, device_of
from rewrite.runtime.leaves import carries_objects, leaves, tensors
from rewrite.runtime.modes import isolated, widen

_MOST_ELEMENTS = 300_000_000
"""At the quick level a batch whose values have more elements together is left out after another."""


_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules whose forward takes another path in `inference_mode`."""


@dataclass(frozen=True)
class Reference:
    """A PyTorch model as what a graph is held to, and what is known of the graph."""

    opened: OnnxFile
    live: Any
    model: nn.Module
    level: Level
    repro: str | Path | None
    seed: int


def against_model(
    reference: Reference,
    cases: Sequence[tuple[str, Inputs]],
    sizes: Sequence[Resized],
    parity: Parity,
) -> Parity:
    """Compare a graph with a PyTorch model in eval mode: outputs on every case, values on one."""
    device = device_of(reference.model)
    moved = perturbed_graph(reference.opened, reference.seed)
    first: _Values | None = None
    for name, inputs in cases:
        inputs = inputs.to(device)
        try:
            with isolated(reference.model):
                own = _deployed(reference, name, inputs)
        except VerificationError:
            if first is None:
                raise
            continue
        feed = feed_of(reference.opened, inputs)
        if first is None:
            first = _compare_values(reference, moved, name, inputs, feed, parity.tolerance is None)
            moved_live = session(moved, "disabled") if len(cases) > 1 else None
        try:
            got = run(reference.live, feed)
        except VerificationError as error:
            parity.failed.append(f"{name}: {one_line(error)}")
            continue
        _check_count(reference.opened, own, got)
        if parity.ran == 0:
            exact, rounding = _outputs(first.exact), first.rounding
            paths = _disagreement(reference.model, own, _outputs(first.traced), first)
            if paths:
                # The exact values are those of the other path.
                exact = own
                right = compare(own, got, dtypes=False).max_rel <= parity.allowed(rounding)
                (parity.notes if right else parity.failed).append(paths)
        else:
            with in_float64(reference.model, streamed=short_of_memory(reference.model)):
                exact = _outputs(call(reference.model, inputs.map(widen), reference.seed))
            assert moved_live is not None
            plain = run(moved_live, perturbed_feed(feed, reference.seed))
            rounding = max(compare(got, plain).max_rel, first.bound)
        _add(reference, parity, name, feed, (exact, own, got), rounding)
    assert first is not None
    _compare_sizes(reference, sizes, parity, first)
    if parity.settle(first.parting) and reference.repro is not None:
        _write_repro(reference, cases[0][1].to(device), first.parting)
    parity.sum_up("the PyTorch model")
    return parity


def _add(
    reference: Reference,
    parity: Parity,
    name: str,
    feed: Feed,
    outputs: tuple[list[Any], list[Any], list[Any]],
    rounding: float,
) -> bool:
    """Take outputs in: exact ones, the model's own and the graph's."""
    exact, own, got = outputs
    expected = [_in_own_type(a, b, c) for a, b, c in zip(exact, own, got, strict=True)]
    ties = tied_outputs(reference.opened, feed, got, expected, EXPLAINS * (rounding + EPS))
    for index, count in ties.items():
        parity.notes.append(
            f"{name}: output[{index}]: {count} indices differ: ties of equal values"
        )
    got = [expected[i] if i in ties else value for i, value in enumerate(got)]
    return parity.add(name, expected, own, got, rounding)


def _in_own_type(exact: Any, own: Any, got: Any) -> Any:
    """Return the exact value; where it has none in the model's own type, what that has there.

    Those are NaN, infinity, and whole numbers that were rounded to another side.
    """
    if not isinstance(exact, torch.Tensor) or not isinstance(own, torch.Tensor):
        return exact
    if exact.shape != own.shape:
        return exact
    if exact.is_floating_point() and own.is_floating_point():
        return torch.where(own.isfinite(), exact, own.to(exact))
    same = np.shape(got) == exact.shape and bool((as_tensor(np.asarray(got)) == exact.cpu()).all())
    return exact if same else own


def _compare_sizes(
    reference: Reference, sizes: Sequence[Resized], parity: Parity, first: _Values
) -> None:
    """Compare outputs at other sizes of the free axes, where the model takes them.

    The noise is that of the given input; only where the model's own values are not near enough
    does it run in float64.
    """
    ran, wrong, left = list[str](), list[str](), list[str]()
    fits = False
    for case in sizes:
        if fits and not case.batch_only and len([r for r in ran if "batch" not in r]) > 1:
            break
        inputs = case.inputs.to(device_of(reference.model))
        elements = first.elements * _count(inputs) / max(1, first.count)
        if reference.level is Level.QUICK and case.batch_only and ran and elements > _MOST_ELEMENTS:
            left.append(case.label)
            continue
        try:
            with isolated(reference.model):
                own = _deployed(reference, case.label, inputs)
        except VerificationError:
            continue
        fits = fits or not case.batch_only
        try:
            feed = feed_of(reference.opened, inputs)
            got = run(reference.live, feed)
        except VerificationError as error:
            wrong.append(f"{case.label}: {one_line(error)}")
            continue
        ran.append(case.label)
        rounding = max(first.rounding, parity.noise)
        if not _near(own, got, parity.allowed(rounding)):
            with in_float64(reference.model, streamed=short_of_memory(reference.model)):
                exact = _outputs(call(reference.model, inputs.map(widen), reference.seed))
            _add(reference, parity, case.label, feed, (exact, own, got), rounding)
    found = "; ".join(wrong) or (f"compared at {'; '.join(ran)}" if ran else "none declared")
    if left:
        found += f" ({'; '.join(left)} left to the thorough level)"
    parity.checks.insert(0, Check("dynamic axes", found, not wrong))


def _count(inputs: Inputs) -> int:
    return sum(t.numel() for t in tensors([inputs.args, dict(inputs.kwargs)]))


def _near(own: list[Any], got: list[Any], allowed: float) -> bool:
    if len(own) != len(got):
        return False
    found = compare(own, got, dtypes=False)
    return found.max_rel <= allowed and not found.reasons


def _outputs(output: Any) -> list[Any]:
    """Return the leaves of an output that an exporter keeps: tensors and numbers.

    Of an output that holds objects (a cache) tensors alone.
    """
    if carries_objects(output):
        return list(tensors(output))
    return [v for _, v in leaves(output) if isinstance(v, torch.Tensor | int | float)]


def _check_count(opened: OnnxFile, own: list[Any], got: list[Any]) -> None:
    if len(own) != len(got):
        raise VerificationError(
            f"{opened.path}: the graph returns {len(got)} values, the PyTorch model {len(own)}"
        )


def _deployed(reference: Reference, name: str, inputs: Inputs) -> list[Any]:
    """Return what the model answers as users run it: plainly, in `inference_mode`."""
    with torch.inference_mode():
        return _outputs(run_original(reference.model, name, inputs, reference.seed))


def _disagreement(model: nn.Module, own: list[Any], traced: list[Any], first: _Values) -> str:
    """Return how far PyTorch's own paths are apart, "" where they agree."""
    found = compare(own, traced, dtypes=False)
    if found.max_rel <= EXPLAINS * (first.rounding + EPS) and not found.reasons:
        return ""
    named = [name or type(m).__name__ for name, m in model.named_modules() if isinstance(m, _PATHS)]
    where = f" in {named[0]} ({type(model.get_submodule(named[0])).__name__})" if named else ""
    off = "; ".join(found.reasons) or f"off by {found.max_rel:.1e}"
    return (
        f"PyTorch disagrees with itself{where}: what it answers in inference_mode and the path "
        f"that is traced and exported are apart ({off}; padded tokens: pytorch/pytorch#110557); "
        "torch.backends.mha.set_fastpath_enabled(False) takes the exported path everywhere"
    )


@dataclass(frozen=True)
class _Values:
    """What a comparison of every value found: the model's exact and own outputs, how far rounding
    moves them, how far long sums of the graph may, and where the graph parts; and how many elements
    the inputs have, and all values on the way together."""

    count: int
    elements: int
    exact: Any
    traced: Any
    rounding: float
    bound: float
    parting: Parting | None


def _compare_values(
    reference: Reference,
    moved: OnnxFile,
    name: str,
    inputs: Inputs,
    feed: Feed,
    judged: bool,
) -> _Values:
    """Compare every value on the way, of a contract that asks for it."""
    model, seed, sketch = reference.model, reference.seed, Sketcher(reference.seed)
    rounding = all_rounding(model)
    with isolated(model), original_takes(name, inputs):
        native, traced = recorded(model, inputs, sketch, seed)
    wide = inputs.map(widen)
    with in_float64(model, streamed=short_of_memory(model)):
        exact_record, exact = recorded(model, wide, sketch, seed)
        with perturbed(model, rounding, seed):
            perturbed_record, away = recorded(model, _stored(inputs, seed), sketch, seed)
    graph = record_graph(reference.opened, feed, sketch, bounds=True)
    own = own_noise(moved, graph, feed, sketch, seed)
    noise = _with_native(value_noise(exact_record, perturbed_record), exact_record, native)
    ends = [own[number] for number in graph.outputs]
    return _Values(
        _count(inputs),
        sum(value.count for value in graph.values),
        exact,
        traced,
        max(compare(exact, away).max_rel, *ends, 0.0),
        end_bound(graph, own),
        find_parting(graph, exact_record, noise, own) if judged else None,
    )


def _stored(inputs: Inputs, seed: int) -> Inputs:
    """Return inputs in float64 that are a rounding of their own type away."""
    nudge = Perturbation(seed + 1)

    def moved(leaf: Any) -> Any:
        narrow = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float32, torch.float16)
        return widen(nudge.stored(leaf, fills=False) if narrow else leaf)

    return inputs.map(moved)


def _write_repro(reference: Reference, inputs: Inputs, parting: Parting | None) -> None:
    """Write the node that is wrong, with what the model has in its place."""
    if parting is None or reference.repro is None:
        return
    model, expected = reference.model, None
    if parting.call is not None:
        with in_float64(model, streamed=short_of_memory(model)):
            wide, key = inputs.map(widen), parting.call.key
            again, _ = recorded(model, wide, Sketcher(reference.seed), reference.seed, keep=key)
        expected = as_array(again.kept[0])
    feed = feed_of(reference.opened, inputs)
    write_repro(reference.repro, reference.opened, feed, parting.divergence, expected)


def _with_native(noise: list[float], exact: Record, native: Record) -> list[float]:
    """Return the noise, at least that of the model's own dtype where it makes the same values."""
    own = [0.0] * len(noise)
    if len(native.values) == len(noise):
        own = list(map(Sketch.distance, exact.values, native.values))
    own = [value if math.isfinite(value) else 0.0 for value in own]
    return [max(*values, EPS / 4) for values in zip(noise, own, strict=True)]
