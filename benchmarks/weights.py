"""Weight norm and re-initialization over the quick tier of the coverage corpus.

    python -m benchmarks.weights                 about half an hour; resumable
    python -m benchmarks.weights --summarize     docs/weights_coverage.md from the results

Per architecture, in float64: the largest output difference after WeightNorm, relative to the
largest output; whether RemoveWeightNorm gives every tensor back bit for bit; and whether the
re-initialized model (he, zeros in residual branches) is finite forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.corpus import QUICK, UnbuildableError, build
from benchmarks.sweep.rows import complete, read
from passes import Reinitialize, RemoveWeightNorm, WeightNorm
from rewrite.init.residual import residual_branches
from rewrite.pipeline import convert
from rewrite.runtime.float64 import KeepFloat64
from rewrite.runtime.modes import widen

RESULTS = Path(__file__).parent / "weights.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "weights_coverage.md"
SECONDS = 240


def main() -> int:
    """Measure what has no result yet, each architecture in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one")
    parser.add_argument("--summarize", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    if not options.summarize:
        complete(RESULTS, QUICK, _in_process)
    PAGE.write_text(page(read(RESULTS)), encoding="utf-8")
    return 0


def _in_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.weights", "--one", name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"no result within {SECONDS} s"}
    if ran.returncode != 0:
        return {"name": name, "error": (ran.stderr.strip().splitlines() or ["died"])[-1][:200]}
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


def measure(name: str) -> dict[str, Any]:
    """Return the row of one architecture."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        model, inputs = build(name)
    except UnbuildableError as error:
        return {"name": name, "error": str(error)[:200]}
    dtype = "float32" if _is_quantized(model) else "float64"
    if dtype == "float64":  # quantized kernels take float32 alone
        model, inputs = model.double(), widen(inputs)
    result = convert(model, [WeightNorm()], verify=False)
    before, after = _outputs(model, inputs), _outputs(result.model, inputs)
    size = max(float(t.abs().max()) for t in before)
    drift = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    removed = convert(result.model, [RemoveWeightNorm()], verify=False).model
    # Some models come with a weight norm of their own, which is removed as well.
    plain = convert(model, [RemoveWeightNorm()], verify=False).model
    was, now = plain.state_dict(), removed.state_dict()
    row = {
        "name": name,
        "layers": len(result.report.changes),
        "left": len(result.report.skips),
        "drift": drift / size if size else drift,
        "removed": was.keys() == now.keys() and all(_equal(was[k], now[k]) for k in was),
        "reasons": sorted({skip.reason for skip in result.report.skips})[:3],
        "dtype": dtype,
    }
    del result, removed
    fresh = convert(model, [Reinitialize(residual="zero")], verify=False)
    row |= _finite(fresh.model, inputs)
    row["drawn"] = len(fresh.report.changes)
    row["undrawn"] = len(fresh.report.skips)
    row["branches"] = _branches(model)
    row["seconds"] = time.perf_counter() - start
    return row


def _is_quantized(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("torch.ao.nn.") for module in model.modules())


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Run in the model's own dtype, also where its code creates float32 tensors."""
    torch.manual_seed(0)
    with contextlib.nullcontext() if _is_quantized(model) else KeepFloat64():
        return model(*inputs)


def _tensors(value: Any) -> list[torch.Tensor]:
    found = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t for t in _tensors(_run(model, inputs)) if t.numel()]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):  # the packed weight and bias of a quantized linear layer
        return all(map(_equal, one, other))
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if one.is_quantized:
        return torch.equal(one, other)
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _finite(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, bool]:
    outputs = _tensors(_run(model, inputs))
    forward = all(bool(torch.isfinite(t).all()) for t in outputs)
    wanted = [t.mean() for t in outputs if t.requires_grad and t.numel()]
    if wanted:
        torch.stack(wanted).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    trained = any(p.requires_grad for p in model.parameters())
    backward = bool(gradients) == trained and all(bool(torch.isfinite(g).all()) for g in gradients)
    return {"forward": forward, "backward": backward}


def _branches(model: nn.Module) -> list[int]:
    from rewrite.graph.capture import capture

    found = residual_branches(capture(model))
    return [sum(1 for branch in found if branch.tails), len(found)]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    good = [row for row in rows if "error" not in row]
    exact = sum(row["drift"] <= 1e-10 for row in good)
    back = sum(row["removed"] for row in good)
    finite = sum(row["forward"] and row["backward"] for row in good)
    missing = [name for name in QUICK if name not in {row["name"] for row in good}]
    lines = [
        "# Weight norm and re-initialization over the quick tier",
        "",
        "Written by `python -m benchmarks.weights`; in float64 (int8 models: float32), with random "
        "weights and norms.",
        "",
        f"- {len(good)} of the {len(QUICK)} architectures of the tier have a result; not measured "
        f"yet: {', '.join(missing) or 'none'}.",
        f"- WeightNorm within 1e-10 of the largest output: {exact} of {len(good)}.",
        f"- RemoveWeightNorm gives every tensor back bit for bit: {back} of {len(good)}.",
        f"- Re-initialized (`he`, `residual=zero`), finite forward and backward: {finite} of "
        f"{len(good)}.",
        "",
        "| architecture | normed | left | drift | removed | drawn | left | finite | branches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | | | | |")
            continue
        finite_text = "yes" if row["forward"] and row["backward"] else "no"
        lines.append(
            f"| {row['name']} | {row['layers']} | {row['left']} | {row['drift']:.1e} | "
            f"{'exact' if row['removed'] else 'no'} | {row['drawn']} | {row['undrawn']} | "
            f"{finite_text} | {row['branches'][0]} of {row['branches'][1]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
