"""Verify an ONNX graph from any exporter: alone, against a PyTorch model, or another graph.

    error(x) = max |ort(x) - f64(x)| / max |f64(x)|
    noise(x) = max |f32(x) - f64(x)| / max |f64(x)|       and what rounding all that is stored does,
                                                          and a bound for long sums
    right:     error <= 8 noise + 8 eps                   at the outputs and at every value between

f64 is the PyTorch model in float64. Without one, the reference is the other graph, or the graph
itself without optimizations, and the noise is what rounding does to it.

The noise is measured on the same input, so a model that amplifies rounding is not called wrong, and
a wrong weight is not lost in a tolerance that was made for such a model. Under the contract
`approximate` (a graph converted to float16) a tolerance takes its place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from rewrite.equivalence.compare import compare
from rewrite.equivalence.record import Sketcher
from rewrite.equivalence.rounding import EXPLAINS
from rewrite.equivalence.variations import adversarial
from rewrite.equivalence.verification import Level
from rewrite.errors import OptionError, VerificationError, one_line
from rewrite.onnx.feeds import Resized, accepts, as_tensor, feed_of, resized
from rewrite.onnx.file import OnnxFile, open_onnx
from rewrite.onnx.model_parity import Reference, against_model
from rewrite.onnx.noise import perturbed_feed, perturbed_graph
from rewrite.onnx.parity import Parity, against_graph, end_bound, own_noise
from rewrite.onnx.report import Check, OnnxVerification
from rewrite.onnx.runtime import LEVELS, fitting_feed, run, session, session_of_file
from rewrite.onnx.structure import check_sizes, structure_problems
from rewrite.onnx.values import record_graph
from rewrite.onnx.vetting.made_up import Feed, is_free
from rewrite.outcomes import Contract, as_choice
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.modes import evaluating
from rewrite.text.suggest import did_you_mean


def verify_onnx(
    path: str | Path,
    model: nn.Module | str | Path | None = None,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    contract: Contract | str = Contract.EXACT_IN_EVAL,
    tolerance: float | None = None,
    level: Level | str = Level.THOROUGH,
    expect: Mapping[str, int] | None = None,
    expect_no: Iterable[str] = (),
    repro: str | Path | None = None,
    seed: int = 0,
    called: str = "given",
) -> OnnxVerification:
    """Verify an ONNX file.

    Args:
        path: the file.
        model: what it should compute: a PyTorch model, or the path of another ONNX file.
        example_inputs: positional inputs, or a dict by the graph's input names; else made up.
        calibration: batches of your own to compare on beside them.
        contract: what the graph promises: the same function, or an approximate one.
        tolerance: of an approximate one, relative to the largest output; without it the distance
            is measured and judged by nobody.
        level: quick (the checker, one session, the given input, declared sizes) or thorough.
        expect: how often an operator has to occur; expect_no: operators that may not occur.
        repro: a folder to write a one-node reproduction into, should the graph be wrong.
        seed: of everything random.
        called: what the report calls the example inputs.

    Raises:
        VerificationError: the file cannot be read or run, or the inputs do not fit it.
        OptionError: an unknown contract or level, a mistyped operator, or a tolerance with one
            that has none.
    """
    begin = time.perf_counter()
    level = as_choice(Level, level, "level")
    parity = Parity(_tolerance(contract, tolerance))
    opened = open_onnx(path)
    checks = [*_structure(opened), *_check_operator_counts(opened, expect or {}, expect_no)]
    live = session_of_file(opened)
    feed = _given(opened, live, example_inputs, seed)
    first = _first(example_inputs, feed)
    sizes = list(resized(opened, first, seed))
    checks += _behaviour(opened, live, feed, level, seed, alone=model is None)
    name = "made up" if example_inputs is None else called
    cases = _cases(opened, name, first, calibration, level, seed)
    if isinstance(model, nn.Module):
        with evaluating(model):
            against_model(Reference(opened, live, model, level, repro, seed), cases, sizes, parity)
    else:
        checks.append(_dynamic(opened, live, sizes, parity))
    if isinstance(model, str | Path):
        feeds = [feed_of(opened, case) for _, case in cases]
        against_graph(opened, live, open_onnx(model), feeds, repro, seed, parity)
    found = parity.numbers() if model is not None else {"notes": tuple(parity.notes)}
    return OnnxVerification(
        path=str(path),
        checks=(*checks, *parity.checks),
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
    expect_no = tuple(expect_no)
    _check_names((*expect, *expect_no), operator_counts)
    checks = []
    for kind, count in expect.items():
        found = operator_counts.get(kind, 0)
        checks.append(Check(f"expect {kind}={count}", f"{found} found", found == count))
    for kind in expect_no:
        found = operator_counts.get(kind, 0)
        checks.append(Check(f"expect no {kind}", f"{found} found", found == 0))
    return checks


def _check_names(kinds: Iterable[str], found: Mapping[str, int]) -> None:
    """Raise for a mistyped operator, which no graph could have."""
    known = {schema.name for schema in onnx.defs.get_all_schemas()} | set(found)
    for kind in kinds:
        if kind not in known and (hint := did_you_mean(kind, known)):
            raise OptionError(f"{kind}: no such operator{hint}")


def _tolerance(contract: Contract | str, tolerance: float | None) -> float | None:
    """Return how far an output may be off, None where the noise says that.

    Raises:
        OptionError: there is no such contract, or it has no tolerance.
    """
    asked = as_choice(Contract, contract, "contract")
    if asked in (Contract.APPROXIMATE, Contract.REDEFINING):
        return math.inf if tolerance is None else tolerance
    if tolerance is not None:
        raise OptionError(
            f"tolerance {tolerance}: the contract {asked.value} has none; pass the contract "
            "approximate with it (--contract approximate)"
        )
    return None


def _given(opened: OnnxFile, live: Any, example_inputs: Any, seed: int) -> Feed:
    """Return a feed that the graph takes: the given inputs, or made-up ones."""
    if example_inputs is not None:
        feed = feed_of(opened, Inputs.of(example_inputs))
        check_sizes(opened, feed)
        return feed
    return fitting_feed(opened, live, seed)


def _first(example_inputs: Any, feed: Feed) -> Inputs:
    """Return the first inputs: the given ones, or the made-up feed by its names."""
    if example_inputs is not None:
        return Inputs.of(example_inputs)
    return Inputs(tuple(as_tensor(value) for value in feed.values()))


def _cases(
    opened: OnnxFile,
    name: str,
    first: Inputs,
    calibration: Iterable[Any] | None,
    level: Level,
    seed: int,
) -> list[tuple[str, Inputs]]:
    """Return named inputs that the graph's declaration takes."""
    cases = [(name, first)]
    for index, batch in enumerate(calibration or ()):
        cases.append((f"calibration batch {index}", Inputs.of(batch)))
    if level is Level.THOROUGH:
        cases += [case for case in adversarial(first, seed) if accepts(opened, case[1])]
    return cases


def _behaviour(
    opened: OnnxFile, live: Any, feed: Feed, level: Level, seed: int, *, alone: bool
) -> list[Check]:
    """Run the graph: twice the same, finite, alike at every optimization level.

    With a reference it is for that to say where NaN and infinity are right.
    """
    names = [value.name for value in opened.model.graph.output]
    first = run(live, feed, graph=opened.path)
    again = compare(first, run(live, feed))
    same = not again.max_abs and not again.reasons
    checks = [Check("deterministic", "two runs are equal" if same else "two runs differ", same)]
    if alone and not compare(first, first).finite:
        checks.append(Check("finite", "the outputs hold NaN or infinity", False))
    if level is Level.THOROUGH:
        checks.append(_levels(opened, dict(zip(names, first, strict=True)), feed, seed))
    return checks


def _levels(opened: OnnxFile, optimized: Mapping[str, Any], feed: Feed, seed: int) -> Check:
    """Compare the outputs at every optimization level with those of the graph as it is."""
    plain = run(session(opened, "disabled"), feed)
    moved_graph, sketch = perturbed_graph(opened, seed), Sketcher(seed)
    moved = run(session(moved_graph, "disabled"), perturbed_feed(feed, seed))
    rounding = compare(plain, moved).max_rel
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
    if worst > _allowed(rounding) and not reasons:
        # Sums in another order: what the values on the way say is dearer, and asked for last.
        record = record_graph(opened, feed, sketch, bounds=True)
        own = own_noise(moved_graph, record, feed, sketch, seed)
        ends = [own[number] for number in record.outputs]
        rounding = max(rounding, end_bound(record, own), *ends, 0.0)
    found = (
        f"{len(LEVELS)} levels, largest difference {worst:.1e} ({where}), rounding {rounding:.1e}"
    )
    if reasons:
        found = "; ".join(reasons[:3])
    ok = worst <= _allowed(rounding) and not reasons
    return Check("optimization levels", found, ok)


def _allowed(rounding: float) -> float:
    return EXPLAINS * (rounding + float(np.finfo(np.float32).eps))


def _dynamic(opened: OnnxFile, live: Any, sizes: Sequence[Resized], parity: Parity) -> Check:
    """Run every size of the free axes: those of the batch have to run, others may be refused.

    So may a batch that an input of a fixed size binds to what it is, as a state may.
    """
    if not sizes:
        return Check("dynamic axes", "none declared")
    ran, failed = list[str](), list[str]()
    bound = any(
        len(dims) > 1 and not any(is_free(dim) for dim in dims)
        for dims in (value.type.tensor_type.shape.dim for value in opened.inputs)
    )
    others = 0
    for case in sizes:
        if not case.batch_only and others > 1:
            break
        feed = feed_of(opened, case.inputs)
        try:
            check_sizes(opened, feed)
            outputs = run(live, feed)
        except VerificationError as error:
            message = f"{case.label}: {one_line(error)}"
            if case.batch_only and not bound:
                failed.append(message)
            else:
                parity.notes.append(
                    f"not at {message if len(message) < 200 else message[:199] + '…'}"
                )
            continue
        ran.append(case.label)
        others += not case.batch_only
        failed += _wrong_sizes(opened, case, outputs)
    found = "; ".join(failed) or (f"runs at {'; '.join(ran)}" if ran else "runs at no other size")
    return Check("dynamic axes", found, not failed)


def _wrong_sizes(opened: OnnxFile, case: Resized, outputs: list[Any]) -> list[str]:
    """Return the outputs that declare an input's symbol and have another size there."""
    wrong = []
    for value, output in zip(opened.model.graph.output, outputs, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            size = case.sizes.get(dim.dim_param) if dim.dim_param else None
            if size is not None and output.shape[axis] != size:
                wrong.append(f"{case.label}: {value.name} has {output.shape[axis]} on axis {axis}")
    return wrong
