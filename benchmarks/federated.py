"""The structure of a conversion and the values of a checkpoint: one law over the quick tier.

    structure(convert(f_θ)) = structure(convert(f_θ'))       keys, shapes, dtypes, eps, classes
    convert(f_θ') with the state dict of convert(f_θ) = convert(f_θ)
    apply-map(report of convert(f_θ), θ') = state dict of convert(f_θ')

    python -m benchmarks.federated [--spec bn-to-gn] [--limit 300] [--write]

Per architecture with a BatchNorm: two draws of all weights and statistics, each converted by itself
with inputs of its own, as a server and a client of federated learning do. Where the first line
holds, the state dict of one is loaded into the other, strictly, and both are run on one input.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import rewrite
from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import QUICK, build, installed
from benchmarks.sweep.workers import Limits, run_all
from models import randomize_norms_
from rewrite.errors import RewriteError
from rewrite.fold.replay import apply_report
from rewrite.runtime.copying import copy_model
from rewrite.runtime.leaves import tensors


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row an architecture, and how many keep the law."""
    options = parser(__doc__)
    options.add_argument("--spec", default="bn-to-gn", help="the swap")
    options.add_argument("--limit", type=int, default=300, help="seconds for one architecture")
    chosen = options.parse_args(arguments)
    rows = []
    run = partial(measure, spec=chosen.spec)
    for row in run_all(filter(installed, QUICK), run, Limits(chosen.limit, 12_000), 1):
        print(row, flush=True)
        rows.append(row)
    publish("federated", "One structure at every client", summary(rows), write=chosen.write)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table and the counts."""
    ran = [row for row in rows if row["status"] == "done"]
    heads = ("architecture", "norms", "structure", "loaded", "apply-map")
    lines = [[row[key] for key in ("name", *heads[1:])] for row in ran]
    equal = sum(row["structure"] == "equal" for row in ran)
    loaded = sum(row["loaded"] == "0e+00" for row in ran)
    mapped = sum(_is_small(row["apply-map"]) for row in ran)
    left = [
        f"{row['name']} ({row['status']})"
        for row in rows
        if row["status"] not in ("done", "no BatchNorm")
    ]
    return (
        f"{table(heads, lines)}\n\n{environment()}\n\nOf {len(ran)} architectures with a BatchNorm "
        f"{equal} have one structure whatever the values, {loaded} return the same bits after the "
        f"state dict of one conversion was loaded into the other, and `apply-map` gives {mapped} "
        f"the state dict of their own conversion (1e-5). Not run: {', '.join(left) or 'none'}."
    )


def _is_small(cell: str) -> bool:
    try:
        return float(cell) <= 1e-5
    except ValueError:
        return False


def measure(name: str, spec: str) -> dict[str, Any]:
    """Return the row of one architecture."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    one, inputs = build(name)
    norms = sum(isinstance(module, _BatchNorm) for module in one.modules())
    if not norms:
        return {"name": name, "status": "no BatchNorm"}
    other = drawn_anew(one)
    server = rewrite.convert(one, [spec], example_inputs=inputs, verify=False)
    client = rewrite.convert(other, [spec], example_inputs=moved(inputs), verify=False)
    row = {"name": name, "status": "done", "norms": norms, "loaded": "", "apply-map": ""}
    row["structure"] = difference(structure(server.model), structure(client.model)) or "equal"
    if row["structure"] == "equal":
        state = dict(client.model.state_dict())
        row["apply-map"] = mapped(json.loads(server.report.to_json()), other, state)
        client.model.load_state_dict(server.model.state_dict())
        row["loaded"] = f"{apart(server.model, client.model, inputs):.0e}"
    return row


def drawn_anew(model: nn.Module) -> nn.Module:
    """Return the model with other weights and statistics."""
    torch.manual_seed(19)
    other = copy_model(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                spread = float(parameter.double().pow(2).mean().sqrt()) or 1.0
                parameter.copy_(spread * torch.randn_like(parameter))
    return randomize_norms_(other, 19).eval()


def moved(inputs: Any) -> Any:
    """Return inputs of the same shapes with other values."""
    if isinstance(inputs, Tensor):
        return inputs.flip(-1) if inputs.is_floating_point() else inputs
    if isinstance(inputs, list | tuple):
        return type(inputs)(moved(part) for part in inputs)
    return inputs


def structure(model: nn.Module) -> dict[str, object]:
    """Return keys, shapes, dtypes, eps and classes."""
    found: dict[str, object] = {
        key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
        for key, value in model.state_dict().items()
    }
    for name, module in model.named_modules():
        found[f"{name} is"] = (type(module).__name__, getattr(module, "eps", None))
    return found


def difference(one: dict[str, object], other: dict[str, object]) -> str:
    """Return the first place where two structures differ, or ""."""
    if list(one) != list(other):
        return f"keys: {sorted(one.keys() ^ other.keys())[:1] or 'their order'}"
    return next((f"{key}: {one[key]}, {other[key]}" for key in one if one[key] != other[key]), "")


def mapped(report: dict[str, Any], model: nn.Module, wanted: dict[str, Any]) -> str:
    """Return how far the mapped state dict of `model` is from `wanted`, or why it is none."""
    try:
        found = apply_report(report, model.state_dict())
    except RewriteError as error:
        return str(error)[:60]
    if found.keys() != wanted.keys():
        return f"keys: {sorted(found.keys() ^ wanted.keys())[:1]}"
    worst = 0.0
    for key, value in wanted.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            a, b = value.double(), found[key].double()
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return f"{worst:.0e}"


def apart(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """Return the largest difference of what two models return, in eval mode."""
    with torch.no_grad():
        torch.manual_seed(0)
        left = tensors(one.eval()(*inputs))
        torch.manual_seed(0)
        right = tensors(other.eval()(*inputs))
        return max(
            (float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True)
             if a.numel() and a.is_floating_point()),
            default=0.0,
        )  # fmt: skip


if __name__ == "__main__":
    main()
