"""One architecture, measured: the row that the sweep writes for it."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks import corpus
from benchmarks.sweep import peers
from benchmarks.sweep.counts import Counts, holds_statistics, identity, run
from benchmarks.sweep.outputs import all_finite, relative_difference, same_shapes
from passes import BatchNormToGroupNorm, FoldNorm
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.operators import norm_of
from rewrite.outcomes import Skip
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model

STRUCTURAL_ABOVE = 1_000_000_000
"""Models of more parameters are rewritten, but not run."""
BRIEF_ABOVE = 300_000_000
"""Models of more parameters are not folded in float64, nor given to the peers."""


def measure(name: str, *, brief: bool = False) -> dict[str, Any]:
    """Return the row of one architecture; an architecture that cannot be built says so.

    A brief row is about capture and `bn-to-gn` alone; another one adds the fold and the peers.
    """
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name}
    if brief:
        row["brief"] = True
    start = time.perf_counter()
    try:
        model = _construct(name)
        row["parameters"] = _parameters(model)
        row["norms"] = sum(holds_statistics(module) for module in model.modules())
        if not row["norms"]:
            _capture_only(row, model)
        elif row["parameters"] > STRUCTURAL_ABOVE:
            _structure_only(row, model)
        else:
            corpus.fill(model)
            _full(row, name, model)
    except corpus.UnbuildableError as error:
        row |= {"status": "unbuildable", "error": str(error)[:300]}
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def with_peers(row: dict[str, Any]) -> dict[str, Any]:
    """Return a brief row with the columns of the peers."""
    torch.set_num_threads(1)
    model = corpus.make(row["name"])
    example_inputs = corpus.fit_inputs(row["name"], model)
    return row | peers.measure(model, example_inputs, run(model, example_inputs)[0])


def _construct(name: str) -> nn.Module:
    """Build in memory that nothing has touched yet; what is too large for that, on meta."""
    try:
        return corpus.construct(name)
    except corpus.UnbuildableError as error:
        if "allocate memory" not in str(error):
            raise
        return corpus.construct(name, "meta")


def _capture_only(row: dict[str, Any], model: nn.Module) -> None:
    """Capture a model without a norm: nothing else applies to it."""
    row["status"] = "no-norm"
    _describe(row, capture(model))


def _structure_only(row: dict[str, Any], model: nn.Module) -> None:
    """Rewrite a model that is too large to run, and count what it is made of."""
    row["status"] = "structure"
    captured = _times(row, model)
    row["seen"] = len(_seen(captured))
    applied = apply_pass(BatchNormToGroupNorm(), model)
    row["left_in_modules"] = sum(holds_statistics(m) for m in applied.model.modules())
    row["skips"] = _reasons(applied.skips)


def _full(row: dict[str, Any], name: str, model: nn.Module) -> None:
    """Run, capture, rewrite, run again; then the peers and the fold."""
    row["status"] = "run"
    example_inputs = corpus.fit_inputs(name, model)
    output, before = run(model, example_inputs)
    row["finite_before"] = all_finite(output)
    row["run"] = len(before.norms)
    row["arithmetic"] = len(before.arithmetic)
    captured = _times(row, model)
    _compare_seen(row, captured, before)
    _swap(row, model, example_inputs, output, before)
    if "brief" not in row and row["parameters"] <= BRIEF_ABOVE:
        _fold(row, model, example_inputs)
        row |= peers.measure(model, example_inputs, output)


def _times(row: dict[str, Any], model: nn.Module) -> Captured:
    """Time capture and symbolic tracing, the better of two runs each; return the capture."""
    if "brief" not in row:
        copied = copy_model(model)  # symbolic_trace stores constants on the model
        try:
            row["trace_seconds"] = _best_of_two(lambda: torch.fx.symbolic_trace(copied))[0]
        except Exception as error:  # noqa: BLE001 - a model may break the tracer in any way
            row["trace_error"] = peers.short(error)
    row["capture_seconds"], captured = _best_of_two(lambda: capture(model))
    _describe(row, captured)
    return captured


def _describe(row: dict[str, Any], captured: Captured) -> None:
    row["regions"] = len(captured.regions)
    row["opaque"] = {name: item.reason[:120] for name, item in list(captured.opaque.items())[:5]}
    row["opaque_count"] = len(captured.opaque)


def _best_of_two(function: Callable[[], Any]) -> tuple[float, Any]:
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function()
        times.append(time.perf_counter() - start)
        if times[0] > 0.2:
            break
    return round(min(times), 4), result


def _seen(captured: Captured) -> dict[int, str]:
    """Return the running means that capture names as batch norms', with their modules."""
    found: dict[int, str] = {}
    for node in captured.nodes():
        norm = norm_of(captured, node)
        if norm is not None and norm.kind == "batch" and norm.running_mean is not None:
            found[identity(captured.tensor(norm.running_mean))] = norm.target
    return found


def _compare_seen(row: dict[str, Any], captured: Captured, before: Counts) -> None:
    """Count the norms that run and that capture sees; name those that it misses."""
    seen = _seen(captured)
    named = {
        identity(module.running_mean): name  # type: ignore[arg-type]
        for name, module in captured.tree.modules()
        if holds_statistics(module)
    }
    unseen = [named.get(mean, "unnamed") for mean in before.norms if mean not in seen]
    row["seen"] = sum(mean in seen for mean in before.norms)
    row["unseen"] = sorted(unseen)[:10]


def _swap(
    row: dict[str, Any],
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    output: Any,
    before: Counts,
) -> None:
    """Apply bn-to-gn to a copy, and count again; with example inputs if it declines without."""
    row["activations"] = before.activations
    try:
        applied = apply_pass(BatchNormToGroupNorm(), copy_model(model))
        if applied.skips:
            row["with_inputs"] = True
            applied = apply_pass(BatchNormToGroupNorm(), copy_model(model), example_inputs)
        row["skips"] = _reasons(applied.skips)
        new_output, after = run(applied.model, example_inputs)
    except Exception as error:  # noqa: BLE001 - a failure of ours is a row, not the end of the sweep
        row["swap_error"] = peers.short(error)
        return
    row["left"] = len(after.norms)
    row["activations_after"] = after.activations
    row["finite"] = all_finite(new_output)
    row["same_shape"] = same_shapes(output, new_output, free_length=_counts_boxes(output))


def _counts_boxes(output: Any) -> bool:
    items = output if isinstance(output, list) else [output]
    return any(isinstance(item, dict) and "boxes" in item for item in items)


def _fold(row: dict[str, Any], model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Fold a copy in float64 and compare; `fold_left` norms still run afterwards.

    Where a reason is that shapes are unknown, it is folded with example inputs, as `convert` does.
    """
    wide = copy_model(model).double()
    inputs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, example_inputs
    )
    try:
        output, before = run(wide, inputs)
    except Exception as error:  # noqa: BLE001 - code that makes float32 tensors does not run in float64
        row["fold_error"] = f"the model itself does not run in float64: {peers.short(error)}"
        return
    try:
        applied = apply_pass(FoldNorm(), copy_model(wide))
        if any("example_inputs" in skip.reason for skip in applied.skips):
            row["fold_with_inputs"] = True
            applied = apply_pass(FoldNorm(), copy_model(wide), inputs)
        row["fold_skips"] = _reasons(applied.skips)
        new_output, after = run(applied.model, inputs)
    except Exception as error:  # noqa: BLE001 - a failure of ours is a row, not the end of the sweep
        row["fold_error"] = peers.short(error)
        return
    row["fold_left"] = len(after.norms)
    row["fold_diff"] = relative_difference(output, new_output)
    if row["fold_diff"] > 1e-10:
        row["rounding"] = _rounding(copy_model(model).double(), inputs, output)
    row["fold_activations_kept"] = before.activations == after.activations


def _rounding(model: nn.Module, inputs: tuple[Any, ...], output: Any) -> float:
    """Return how far the output moves when the inputs move by float64's rounding.

    Random weights make some models chaotic; there a difference of that size is no error.
    """
    moved = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x * (1 + 1e-14) if x.is_floating_point() else x, inputs
    )
    return relative_difference(output, run(model, moved)[0])


def _reasons(skips: Iterable[Skip]) -> dict[str, int]:
    return dict(Counter(skip.reason for skip in skips).most_common(8))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
