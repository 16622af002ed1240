"""Rebalancing: equality over architectures, time, and what 8 bits a tensor leave of real weights.

    python -m benchmarks.rebalance equality [NAME ...] [--write]   the quick tier, or those named
    python -m benchmarks.rebalance equality --results FILE         goes on where FILE ends
    python -m benchmarks.rebalance quantize [--write]              MobileNetV2, EfficientNet-Lite0,
                                                                   a thin ResNet-50
    python -m benchmarks.rebalance time [--write]                  a ResNet-50 of torchvision

equality: in float64, the largest output difference relative to the largest output, for each
objective; how many groups are scaled, how many on a second run, and the same difference after
`apply-map` has repeated the scales on another checkpoint (parameters and norms drawn anew), where
they leave that one's function alone. An architecture without any ReLU has no groups.

quantize: kernels rounded to 8 bits a tensor, symmetric between -max and max or asymmetric (Nagel et
al.); norms folded; the top-1 agreement with the original on random crops of the photos of `foolbox`
(`benchmarks.keep_function`), and the change of the logits in units of how they differ from photo to
photo. The rows with ReLU replace ReLU6, those with clipped channels do not.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._table import RESCALING, environment, parser, publish, table
from benchmarks.corpus import QUICK, UnbuildableError, build, installed
from passes import Rebalance
from rewrite.fold.replay import apply_recipes
from rewrite.protocol import apply_pass
from rewrite.rescaling.plan import OBJECTIVES
from rewrite.runtime.copying import copy_model
from rewrite.runtime.float64 import KeepFloat64
from rewrite.runtime.leaves import tensors
from rewrite.runtime.modes import widen


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Run in float64, also where the model's code creates float32 tensors."""
    torch.manual_seed(0)
    with KeepFloat64(), torch.no_grad():
        return tensors(model(*inputs))


def equality(names: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """Yield a row an architecture: per objective groups, groups of a second run, and the errors."""
    for name in names:
        try:
            built, inputs = build(name)
        except UnbuildableError as error:
            yield (name, f"not built: {str(error)[:40]}", "", "")
            continue
        model, inputs = built.double(), widen(inputs)
        other = drawn_anew(model)
        yield (name, *(cell(model, other, objective, inputs) for objective in OBJECTIVES))


def cell(model: nn.Module, other: nn.Module, objective: str, inputs: tuple[Any, ...]) -> str:
    """Return groups, groups of a second run, the error, and that of a replay on `other`."""
    item = Rebalance(objective=objective)
    applied = apply_pass(item, copy_model(model), inputs)
    if not applied.changes:
        return f"none: {applied.skips[0].reason[:40]}" if objective == "path" else "none"
    again = apply_pass(item, copy_model(applied.model), inputs).changes
    replayed = copy_model(other)
    recipes = [change.recipe for change in applied.changes]
    written = apply_recipes(recipes, (), other.state_dict())
    replayed.load_state_dict(written)
    errors = (error(model, applied.model, inputs), error(other, replayed, inputs))
    text = f"{len(applied.changes)}, {len(again)}, {errors[0]:.0e}, {errors[1]:.0e}"
    keys = list(applied.model.state_dict()) == list(model.state_dict()) == list(written)
    return text if keys else f"{text}, other keys"


def error(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the largest output difference, relative to the largest output."""
    before, after = outputs(one, inputs), outputs(other, inputs)
    size = max(float(t.abs().max()) for t in before)
    pairs = zip(before, after, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs) / size


def drawn_anew(model: nn.Module) -> nn.Module:
    """Return another checkpoint: each parameter times a number of its own, between 0.7 and 1.4."""
    torch.manual_seed(1)
    other = copy_model(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.rand_like(parameter).sub_(0.5).exp_())
    return other


def noted(results: Path | None) -> list[tuple[object, ...]]:
    """Return the rows that a file holds already."""
    if results is None or not results.exists():
        return []
    return [tuple(json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]


def symmetric(weight: Tensor, bits: int = 8) -> Tensor:
    """Return a tensor rounded to 2^bits - 1 levels between -max and max."""
    levels = 2 ** (bits - 1) - 1
    step = weight.abs().max() / levels
    return (weight / step).round().clamp(-levels, levels) * step


def asymmetric(weight: Tensor, bits: int = 8) -> Tensor:
    """Return a tensor rounded to 2^bits levels between its least and its largest, 0 among them."""
    low, high = weight.min().clamp(max=0), weight.max().clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return ((weight / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step


def quantized(model: nn.Module, rounded: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy whose kernels are rounded, a tensor at a time."""
    result = copy_model(model)
    with torch.no_grad():
        for module in result.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight = nn.Parameter(rounded(module.weight))
    return result


def quantization(crops: int) -> Iterator[tuple[object, ...]]:
    """Yield a row a model and a way to prepare it: agreement without and with 8 bits a tensor."""
    from benchmarks import open_nsfw
    from benchmarks.keep_function import efficientnet_lite, mobilenet

    for make in (mobilenet, efficientnet_lite, open_nsfw.subject):
        yield from quantizations(make(crops=crops))


def quantizations(subject: Any) -> Iterator[tuple[object, ...]]:
    """Yield a row a way to prepare one model."""
    from passes import ClipChannels, FoldNorm

    ways: dict[str, list[Any]] = {
        "fold": [FoldNorm()],
        "fold, rebalance equalize": [FoldNorm(), Rebalance("equalize")],
        "fold, clip channels, rebalance equalize": [
            FoldNorm(),
            ClipChannels(),
            Rebalance("equalize"),
        ],
        "fold, rebalance equalize, clipped relu": [FoldNorm(), Rebalance("equalize", "relu")],
        "fold, rebalance l2, clipped relu": [FoldNorm(), Rebalance("l2", "relu")],
    }
    for name, passes_ in ways.items():
        model = copy_model(subject.model)
        for item in passes_:
            model = apply_pass(item, model, (subject.example,)).model
        scores = [subject.score(model)]
        scores += [subject.score(quantized(model, way)) for way in (symmetric, asymmetric)]
        print(subject.name, name, scores, flush=True)
        agreements = (f"{score['agreement']:.1f} %" for score in scores)
        yield (subject.name, name, *agreements, *(f"{s['error']:.2f}" for s in scores[1:]))


def times() -> Iterator[tuple[object, ...]]:
    """Yield seconds and CPU seconds of one application to a ResNet-50, per objective."""
    import torchvision

    torch.set_num_threads(1)  # CPU time of several threads counts their waiting, too
    model, x = torchvision.models.resnet50().eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        begin = time.process_time()
        model(x)
        forward = time.process_time() - begin
    for objective in OBJECTIVES:
        wall, cpu = time.perf_counter(), time.process_time()
        applied = apply_pass(Rebalance(objective=objective), copy_model(model), x)
        cpu = time.process_time() - cpu
        yield (
            objective, len(applied.changes), f"{time.perf_counter() - wall:.1f}", f"{cpu:.1f}",
            f"{cpu / forward:.0f}",
        )  # fmt: skip


def main() -> None:
    """Print one of the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["equality", "quantize", "time"])
    arguments.add_argument("names", nargs="*")
    arguments.add_argument("--results", type=Path, help="rows of equality, one a line; appended to")
    arguments.add_argument("--crops", type=int, default=5, help="of each photo, for quantize")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    if options.what == "equality":
        heads = (
            "architecture",
            *(f"{objective}: scaled, again, error, replayed" for objective in OBJECTIVES),
        )
        names = options.names or QUICK
        rows = [row for row in noted(options.results) if row[0] in names]
        done = {row[0] for row in rows}
        for row in equality([n for n in names if n not in done and installed(n)]):
            print(row, flush=True)
            rows.append(row)
            if options.results is not None:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        title = "Rebalancing leaves the function alone"
    elif options.what == "quantize":
        heads = (
            "trained weights",
            "prepared by",
            "agreement",
            "8 bits, symmetric",
            "asymmetric",
            "error, symmetric",
            "asymmetric",
        )
        rows, title = list(quantization(options.crops)), "Weights of 8 bits a tensor"
    else:
        heads = ("objective", "groups", "seconds", "CPU seconds", "/ forward")
        rows, title = list(times()), "Time to rebalance a ResNet-50"
    body = f"{table(heads, rows)}\n\n{environment()}"
    name = f"rebalance-{options.what}"
    publish(name, title, body, write=options.write, page=RESCALING)


if __name__ == "__main__":
    main()
