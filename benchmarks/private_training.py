"""Private training after a swap: which architectures Opacus takes, and trains for a step.

    python -m benchmarks.private_training [--draw 200] [--limit 150] [--workers 1] [--write]
    python -m benchmarks.private_training --summarize --write        # the rows so far; runs nothing

Per architecture with a BatchNorm: `make_private` and one step of DP-SGD after `--bn-to-gn` alone,
after `--bn-to-gn --out-of-place` in each mode of Opacus and as one layer (`AsOneLayer`), and after
Opacus' own `ModuleValidator.fix`. A detector returns losses and needs boxes: as one layer it gets
two of them an image (docs/recipes/opacus.md). Where a step was taken, the gradients of single
samples in float64 are compared with those of runs with one sample. Architectures: the quick tier
of the sweep, and a draw from all of it: what has a row, and others in the order of a hash of their
names, which stays as it is where the sweep grows. Weights are random. Rows are appended to
private_training.jsonl; what has one is not run again, so a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rewrite
from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import QUICK, build, installed
from benchmarks.sweep.peers import opacus_fix
from benchmarks.sweep.rows import append, read
from benchmarks.sweep.workers import Limits, run_all
from rewrite.runtime.copying import copy_model
from rewrite.runtime.leaves import tensors
from rewrite.training import AsOneLayer

RESULTS = Path(__file__).parent / "private_training.jsonl"
SWEEP = Path(__file__).parent / "coverage.jsonl"
OURS = "bn-to-gn, out-of-place"
ONE = "as one layer"
MODES = {OURS: "hooks", f"{OURS}, functorch": "functorch", f"{OURS}, ew": "ew"}
WAYS = ("bn-to-gn", *MODES, ONE, "Opacus' fix")
_SEED = 19
_TOLERANCE = 1e-6


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no row yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--draw", type=int, default=200, help="beside the quick tier")
    options.add_argument("--limit", type=int, default=150, help="seconds for one architecture")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--summarize", action="store_true", help="run nothing")
    chosen = options.parse_args(arguments)
    wanted = [name for name in QUICK if installed(name)]
    wanted += draw(chosen.draw, exclude=wanted)
    if not chosen.summarize:
        done = {row["name"] for row in read(RESULTS)}
        pending = [name for name in wanted if name not in done]
        for row in run_all(pending, measure, Limits(chosen.limit, 12_000), chosen.workers):
            append(RESULTS, row)
            print(row, flush=True)
    title = "Private training after a swap"
    publish("private-training", title, summary(read(RESULTS)), write=chosen.write)


def draw(count: int, exclude: Sequence[str]) -> list[str]:
    """Return `count` architectures of the sweep that have a BatchNorm, those with a row first."""
    swept = [row for row in read(SWEEP) if row.get("norms")]
    small = {row["name"] for row in swept if row["parameters"] < 60_000_000}
    done = dict.fromkeys(row["name"] for row in read(RESULTS) if row["name"] not in exclude)
    rest = sorted(small - set(exclude) - set(done), key=_order)
    return [*done, *(name for name in rest if installed(name))][:count]


def _order(name: str) -> bytes:
    return hashlib.sha256(f"{_SEED} {name}".encode()).digest()


def measure(name: str) -> dict[str, Any]:
    """Return the row of one architecture: per way "ok" or what stopped it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, inputs = build(name)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return {"name": name, "status": "no BatchNorm"}
    passes = ["bn-to-gn", "out-of-place"]

    def ours(count: int) -> nn.Module:
        return rewrite.convert(model, passes[:count], example_inputs=inputs, verify=False).model

    swapped = ours(2)
    detects = type(model).__module__.startswith("torchvision.models.detection")
    targets = detection_batch() if detects else inputs

    def one_layer() -> nn.Module:
        copy = copy_model(swapped)
        return AsOneLayer(LossesOfSamples(copy.train()) if detects else copy)

    makes: dict[str, Callable[[], nn.Module]] = {
        "bn-to-gn": lambda: ours(1),
        **{way: lambda: copy_model(swapped) for way in MODES},
        ONE: one_layer,
        "Opacus' fix": lambda: opacus_fix(copy_model(model)),
    }
    row: dict[str, str] = {}
    for way, make in makes.items():
        given = targets if way == ONE else inputs
        row[way] = _outcome(partial(_step_of, make, given, MODES.get(way, "hooks")))
    compared = next((way for way in (ONE, OURS) if row[way] == "ok"), "")
    if compared:
        given = targets if compared == ONE else inputs
        row["gradients"] = _outcome(lambda: f"{gradient_error(makes[compared](), given):.0e}")
    return {"name": name, "status": "done"} | row


class LossesOfSamples(nn.Module):
    """The losses that a detector of torchvision returns for each image: (N, how many there are)."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self, images: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        rows = []
        for image, box, label in zip(images, boxes, labels, strict=True):
            losses = self.detector([image], [{"boxes": box.to(image.dtype), "labels": label}])
            rows.append(torch.stack(list(losses.values())))
        return torch.stack(rows)


def detection_batch() -> tuple[torch.Tensor, ...]:
    """Return two images, the two boxes of each, and their labels."""
    boxes = torch.tensor([[5, 5, 40, 40], [10, 20, 50, 60]])
    return torch.rand(2, 3, 64, 64), boxes.repeat(2, 1, 1), torch.tensor([[1, 2], [2, 1]])


def _outcome(run: Callable[[], str]) -> str:
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - the row says what stopped it
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _step_of(make: Callable[[], nn.Module], inputs: tuple[Any, ...], mode: str) -> str:
    return step(make(), inputs, mode)


def step(model: nn.Module, inputs: tuple[Any, ...], mode: str) -> str:
    """Make a model private, take one step of DP-SGD, and return "ok"; or raise."""
    from opacus import PrivacyEngine

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.zeros(8, 1)), batch_size=2
    )
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(trained, lr=0.01), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )  # fmt: skip
    _loss(private, inputs).backward()
    optimizer.step()
    return "ok"


def gradient_error(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the largest error of the gradients of single samples, relative to the largest one.

    Two samples in float64. Random numbers are those of one seed, drawn for one sample after the
    other, as `AsOneLayer` takes them.
    """
    from opacus.grad_sample.utils import prepare_module

    model = model.double().train()
    generator = torch.Generator().manual_seed(_SEED)
    pair = tuple(
        torch.randn(2, *x.shape[1:], generator=generator, dtype=torch.double)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in inputs
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = []
    _seed()
    for number in range(2):
        one = tuple(x[number : number + 1] if isinstance(x, torch.Tensor) else x for x in pair)
        wanted.append(torch.autograd.grad(_loss(model, one), parameters, allow_unused=True))
    private = prepare_module(model, "hooks")
    _seed()
    _loss(private, pair).backward()
    largest = error = 0.0
    for place, parameter in enumerate(parameters):
        found = getattr(parameter, "grad_sample", None)
        for number in range(2):
            gradient = wanted[number][place]
            if gradient is None:
                continue
            if found is None:
                raise ValueError("a parameter has no gradient of single samples")
            largest = max(largest, float(gradient.abs().max()))
            error = max(error, float((found[number] - gradient).abs().max()))
    return error / largest


def _seed() -> None:
    torch.manual_seed(_SEED)
    np.random.seed(_SEED)  # wav2vec2 masks by the global generator


def _loss(model: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
    """Return a mean over samples of what each of them adds."""
    outputs = [t for t in tensors(model(*inputs)) if t.requires_grad]
    dtype = torch.promote_types(outputs[0].dtype, torch.float)
    return torch.stack([t.to(dtype).square().mean() for t in outputs]).sum()


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the counts, and what stopped the others."""
    ran = [row for row in rows if row.get("status") == "done"]
    other = Counter(row["status"] for row in rows if row["status"] not in ("done", "no BatchNorm"))
    either = [row for row in ran if "ok" in (row[OURS], row[ONE])]
    counts = {way: sum(row[way] == "ok" for row in ran) for way in WAYS}
    kinds = {way: Counter(_kind(row[way]) for row in ran if row[way] != "ok") for way in WAYS}
    reasons = sorted(set().union(*kinds.values()), key=lambda kind: (-kinds[OURS][kind], kind))
    lines: list[list[object]] = [
        ["trained for a step", *(f"{counts[way]} of {len(ran)}" for way in WAYS)]
    ]
    lines += [[kind, *(kinds[way][kind] for way in WAYS)] for kind in reasons]
    left = ", ".join(f"{n} {status}" for status, n in other.items()) or "none"
    stopped = [row for row in ran if row not in either]
    names_ = ", ".join(f"{row['name']} ({_kind(row[OURS])})" for row in stopped) or "none"
    return (
        f"{environment('opacus', 'timm')}. {len(ran)} architectures with a BatchNorm, in the order "
        f"of the quick tier and then of the draw; ended otherwise: {left}. Mode `hooks` where no "
        f"other is named.\n\n{table(['', *WAYS], lines)}\n\nAfter `--bn-to-gn --out-of-place`, as "
        f"they are or as one layer: {len(either)} of {len(ran)} "
        f"({len(either) / max(1, len(ran)):.1%}). Left: {names_}.\n\n{_gradients(either)}"
    )


def _gradients(rows: Sequence[dict[str, Any]]) -> str:
    """Say how far the gradients of single samples are from those of runs with one sample."""
    errors: dict[str, float] = {}
    failed = []
    for row in rows:
        try:
            errors[row["name"]] = float(row["gradients"])
        except ValueError:
            failed.append(f"{row['name']} ({row['gradients'][:60]})")
    close = sum(error <= _TOLERANCE for error in errors.values())
    far = [f"{name} ({error:.0e})" for name, error in errors.items() if error > _TOLERANCE]
    worst = max((e for e in errors.values() if e <= _TOLERANCE), default=0.0)
    text = (
        f"The gradients of single samples equal those of runs with one sample, in float64 and to "
        f"{_TOLERANCE:.0e} of the largest, in {close} of {len(errors)}; the largest error of these "
        f"is {worst:.0e}."
    )
    text += f" Others: {', '.join(far)}." if far else ""
    return text + (f" Not compared: {', '.join(failed)}." if failed else "")


def _kind(text: str) -> str:
    left = "a BatchNorm is left: the model chooses it by an attribute"
    known = {
        "modified inplace": "a view is modified in place",
        "with buffers": "Opacus: a trainable layer with buffers",
        "targets should not be none": "a detector: its loss needs boxes",
        "stack expects": "Opacus: no per-sample gradient of a bare parameter",
        "ExpandedWeights": "Opacus, mode ew: rows are no samples",
        "Expanded Weights": "Opacus, mode ew: an operation without a rule",
        "wrap it to return one tensor": "as one layer: several outputs",
        "randomness": "as one layer: random numbers",
        "BatchNorm cannot support": left,
        "keeps statistics of the batch": left,
        "IllegalModuleConfiguration": "Opacus: a layer that it does not know",
        "UnsupportedModuleError": "Opacus: a layer that it does not know",
    }
    return next((kind for part, kind in known.items() if part in text), text.split(":")[0])


if __name__ == "__main__":
    main()
