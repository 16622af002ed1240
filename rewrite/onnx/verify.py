"""Verify an ONNX graph made by anyone: alone, against a PyTorch model, against another graph.

    error(x) = max |ort(x) - f64(x)| / max |f64(x)|
    noise(x) = max |f32(x) - f64(x)| / max |f64(x)|       and what rounding each weight once does
    right:     error <= 8 noise + 8 eps                   at the outputs and at every value between

f64 is the PyTorch model in float64. Without one, the reference is the other graph, or the graph
itself without optimizations, and the noise is what rounding each weight once does to it.

The noise is measured on the same input, so a model that amplifies rounding is not called wrong, and
a wrong weight is not lost in a tolerance that was made for such a model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rewrite.equivalence.compare import compare
from rewrite.equivalence.rounding import EXPLAINS
from rewrite.equivalence.variations import adversarial
from rewrite.equivalence.verification import Level
from rewrite.errors import VerificationError, one_line
from rewrite.onnx.file import OnnxFile, open_onnx
from rewrite.onnx.parity import against_graph, against_model
from rewrite.onnx.report import Check, OnnxVerification
from rewrite.onnx.runtime import (
    LEVELS,
    Feed,
    accepts,
    dynamic_axes,
    feed_of,
    run,
    session,
    synthetic_feed,
    with_perturbed_weights,
)
from rewrite.onnx.structure import structure_problems
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.modes import evaluating

_BATCHES = (1, 2, 7)


def verify_onnx(
    path: str | Path,
    model: nn.Module | str | Path | None = None,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    level: Level = Level.THOROUGH,
    expect: Mapping[str, int] | None = None,
    expect_no: Iterable[str] = (),
    repro: str | Path | None = None,
    seed: int = 0,
) -> OnnxVerification:
    """Verify an ONNX file.

    Args:
        path: the file.
        model: what it should compute: a PyTorch model, or the path of another ONNX file.
        example_inputs: positional inputs, or a dict by the graph's input names; without them they
            are made up from the graph's declaration.
        calibration: batches of your own to compare on beside them.
        level: quick (the checker, one session, the given input) or thorough.
        expect: how often an operator has to occur.
        expect_no: operators that may not occur.
        repro: a folder to write a one-node reproduction into, should the graph be wrong.
        seed: of everything random.

    Raises:
        VerificationError: the file cannot be read or run, or the inputs do not fit it.
    """
    begin = time.perf_counter()
    opened = open_onnx(path)
    checks = [*_structure(opened), *_check_operator_counts(opened, expect or {}, expect_no)]
    live = session(opened.path)
    feed = _given(opened, example_inputs, seed)
    checks += _behaviour(opened, live, feed, level, seed)
    parity = None
    if isinstance(model, nn.Module):
        cases = _cases(opened, example_inputs, feed, calibration, level, seed)
        with evaluating(model):
            parity = against_model(opened, live, model, cases, level, repro, seed)
    elif model is not None:
        feeds = [
            feed_of(opened, case)
            for _, case in _cases(opened, example_inputs, feed, calibration, level, seed)
        ]
        parity = against_graph(opened, live, open_onnx(model), feeds, repro, seed)
    found = {} if parity is None else parity.numbers()
    return OnnxVerification(
        path=str(path),
        checks=(*checks, *(parity.checks if parity is not None else ())),
        operator_counts=opened.operator_counts,
        opset=opened.opset,
        seconds=time.perf_counter() - begin,
        **found,
    )


def _structure(opened: OnnxFile) -> list[Check]:
    problems = structure_problems(opened)
    nodes = sum(opened.operator_counts.values())
    domains = sorted({node.domain for node in opened.model.graph.node if node.domain})
    found = f"opset {opened.opset}, {nodes} nodes" + (f", domains {domains}" if domains else "")
    return [Check("graph", found), *(Check("graph", problem, False) for problem in problems)]


def _check_operator_counts(
    opened: OnnxFile, expect: Mapping[str, int], expect_no: Iterable[str]
) -> list[Check]:
    operator_counts = opened.operator_counts
    checks = []
    for kind, count in expect.items():
        found = operator_counts.get(kind, 0)
        checks.append(Check(f"expect {kind}={count}", f"{found} found", found == count))
    for kind in expect_no:
        found = operator_counts.get(kind, 0)
        checks.append(Check(f"expect no {kind}", f"{found} found", found == 0))
    return checks


def _given(opened: OnnxFile, example_inputs: Any, seed: int) -> Feed:
    if example_inputs is None:
        try:
            return synthetic_feed(opened, seed=seed)
        except (MemoryError, ValueError) as error:
            raise VerificationError(
                f"{opened.path}: no inputs of its declared shapes can be made: {one_line(error)}"
            ) from error
    return feed_of(opened, Inputs.of(example_inputs))


def _cases(
    opened: OnnxFile,
    example_inputs: Any,
    feed: Feed,
    calibration: Iterable[Any] | None,
    level: Level,
    seed: int,
) -> list[tuple[str, Inputs]]:
    """Return named inputs that the graph's declaration takes."""
    tensors = tuple(torch.from_numpy(np.array(value)) for value in feed.values())
    first = Inputs.of(example_inputs) if example_inputs is not None else Inputs(tensors)
    cases = [("given" if example_inputs is not None else "made up", first)]
    for index, batch in enumerate(calibration or ()):
        cases.append((f"calibration batch {index}", Inputs.of(batch)))
    if level is Level.THOROUGH:
        cases += [case for case in adversarial(first, seed) if accepts(opened, case[1])]
    return cases


def _behaviour(opened: OnnxFile, live: Any, feed: Feed, level: Level, seed: int) -> list[Check]:
    """Run the graph: batch sizes that it declares, optimization levels, twice the same."""
    names = [value.name for value in opened.model.graph.output]
    first = run(live, feed, graph=opened.path)
    again = compare(first, run(live, feed))
    same = not again.max_abs and not again.reasons
    checks = [
        Check("deterministic", "two runs are equal" if same else "two runs differ", same),
        *_dynamic(opened, live, seed),
    ]
    if not compare(first, first).finite:
        checks.append(Check("finite", "the outputs hold NaN or infinity", False))
    if level is Level.THOROUGH:
        checks.append(_levels(opened, dict(zip(names, first, strict=True)), feed, seed))
    return checks


def _levels(opened: OnnxFile, optimized: Mapping[str, Any], feed: Feed, seed: int) -> Check:
    """Compare the outputs at every optimization level with those of the graph as it is."""
    plain = run(session(opened, "disabled"), feed)
    moved = run(session(with_perturbed_weights(opened, seed), "disabled"), feed)
    rounding = compare(plain, moved).max_rel
    allowed = EXPLAINS * (rounding + float(np.finfo(np.float32).eps))
    worst, where = 0.0, "disabled"
    reasons: list[str] = []
    for name in LEVELS:
        if name == "disabled":
            continue
        outputs = list(optimized.values()) if name == "all" else run(session(opened, name), feed)
        compared = compare(plain, outputs)
        reasons += [f"{name}: {reason}" for reason in compared.reasons]
        if compared.max_rel > worst:
            worst, where = compared.max_rel, name
    found = (
        f"{len(LEVELS)} levels, largest difference {worst:.1e} ({where}), rounding {rounding:.1e}"
    )
    if reasons:
        found = "; ".join(reasons[:3])
    return Check("optimization levels", found, worst <= allowed and not reasons)


def _dynamic(opened: OnnxFile, live: Any, seed: int) -> list[Check]:
    """Run every batch size where the graph says that the first axis is dynamic."""
    axes = dynamic_axes(opened)
    batched = [name for name, dynamic in axes.items() if 0 in dynamic]
    if not batched:
        return [Check("dynamic axes", "none declared on the batch")]
    failed = []
    for size in _BATCHES:
        try:
            outputs = run(live, synthetic_feed(opened, size, seed))
        except VerificationError as error:
            failed.append(f"batch {size}: {one_line(error)}")
            continue
        failed += _wrong_batch(opened, axes[batched[0]][0], size, outputs)
    sizes = ", ".join(map(str, _BATCHES))
    found = "; ".join(failed) or f"runs at batch sizes {sizes}"
    return [Check("dynamic axes", found, not failed)]


def _wrong_batch(opened: OnnxFile, symbol: str, size: int, outputs: list[Any]) -> list[str]:
    """Return the outputs that declare the batch's symbol and have another size there."""
    wrong = []
    for value, output in zip(opened.model.graph.output, outputs, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param == symbol and output.shape[axis] != size:
                wrong.append(f"batch {size}: {value.name} has {output.shape[axis]} on axis {axis}")
    return wrong
