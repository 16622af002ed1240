"""The figures of Glorot & Bengio (2010) and He et al. (2015), paper and measured side by side.

    python -m benchmarks.signal                    a minute
    python -m benchmarks.signal --plots DIR        pictures, before and after
    python -m benchmarks.signal --time             ResNet-152, signal propagation of all its layers

Glorot & Bengio, section 4.2: five hidden layers of 1,000 tanh units, gradients of a softmax cross
entropy; `standard` is their equation 1, U[-1/sqrt(n), 1/sqrt(n)], `glorot` their equation 16.
He et al., section 2.2: 30 layers of ReLU, where Xavier's initialization leaves no signal.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from benchmarks._table import parser as arguments
from benchmarks._table import publish, table
from passes import Reinitialize
from rewrite.pipeline import convert
from rewrite.signals.measure import signal
from rewrite.signals.report import Signal


def perceptron(depth: int, width: int, activation: type[nn.Module], classes: int) -> nn.Sequential:
    """Return hidden layers of one width, and a linear layer on top."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(depth):
        layers[f"hidden{index + 1}"] = nn.Linear(width, width)
        layers[f"activation{index + 1}"] = activation()
    layers["top"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def pixels(count: int, width: int) -> torch.Tensor:
    """Return inputs of the spread of centred pixels: the paper's data are images in [0, 1].

    Larger inputs drive the first tanh out of its linear part, and with standard normal ones the
    mean singular value under `glorot` is 0.65, not 0.8.
    """
    return torch.rand(count, width, generator=torch.Generator().manual_seed(0)) - 0.5


def measured(model: nn.Sequential, scheme: str, inputs: torch.Tensor) -> Signal:
    """Return the signal of the model under a scheme, with gradients of a cross entropy."""
    fresh = convert(model, [Reinitialize(scheme=scheme)], verify=False).model
    labels = torch.randint(10, (len(inputs),), generator=torch.Generator().manual_seed(1))
    return signal(fresh, inputs, loss=lambda out: nn.functional.cross_entropy(out, labels))


def spread(found: Signal) -> float:
    """Return the gradient's spread at the bottom hidden layer over that at the top one."""
    hidden = [row for row in found.layers if row.name.startswith("hidden")]
    return float(hidden[0].grad_std or 0) / float(hidden[-1].grad_std or 1)


def singular_mean(found: Signal) -> float:
    """Return the mean singular value between consecutive hidden layers."""
    values = [r.jacobian.mean for r in found.layers[1:-1] if r.jacobian is not None]
    return sum(values) / len(values)


def main() -> int:
    """Measure, print, and return 1 if a figure of the papers is missed."""
    parser = arguments(__doc__)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    if options.time:
        return time_resnet()
    inputs = pixels(300, 1000)
    tanh = perceptron(5, 1000, nn.Tanh, 10)
    standard, glorot = (measured(tanh, scheme, inputs) for scheme in ("standard", "glorot"))
    relu = perceptron(30, 1000, nn.ReLU, 10)
    deep = {s: measured(relu, s, inputs) for s in ("glorot", "he:relu")}
    alive = {s: found.layers[-2].std / found.layers[0].std for s, found in deep.items()}
    rows = [
        ("mean singular value, standard", "about 0.5", singular_mean(standard), (0.45, 0.55)),
        ("mean singular value, normalized", "about 0.8", singular_mean(glorot), (0.7, 0.9)),
        ("gradient, bottom over top, standard", "shrinks", spread(standard), (0.0, 0.25)),
        ("gradient, bottom over top, normalized", "level", spread(glorot), (0.5, 2.0)),
        ("30 ReLU layers, last over first, Glorot", "dies", alive["glorot"], (0.0, 1e-3)),
        ("30 ReLU layers, last over first, He", "stays alive", alive["he:relu"], (0.3, 3.0)),
    ]
    cells = [
        [what, paper, f"{value:.3g}", "yes" if low <= value <= high else "NO"]
        for what, paper, value, (low, high) in rows
    ]
    layers = [
        [row.name, f"{row.std:.3g}", f"{row.grad_std:.3g}", f"{other.std:.3g}",
         f"{other.grad_std:.3g}"]
        for row, other in zip(standard.layers, glorot.layers, strict=True)
    ]  # fmt: skip
    heads = ["layer", "std", "gradient", "std, normalized", "gradient, normalized"]
    both = [table(["quantity", "paper", "measured", "agrees"], cells), table(heads, layers)]
    publish("signal", "Signal propagation", "\n\n".join(both), write=options.write)
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        glorot.plot(options.plots / "glorot_2010.png", before=standard)
        deep["he:relu"].plot(options.plots / "he_2015.png", before=deep["glorot"])
    return 0 if all(row[-1] == "yes" for row in cells) else 1


def time_resnet() -> int:
    """Print how long all layers of a ResNet-152 take, and how much memory."""
    import resource

    import torchvision

    model = torchvision.models.resnet152().eval()
    start, busy = time.perf_counter(), time.process_time()
    found = signal(model, torch.randn(2, 3, 224, 224))
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    known = sum(row.jacobian is not None for row in found.layers)
    print(
        f"ResNet-152, 2x3x224x224, {torch.get_num_threads()} threads: {seconds:.1f} s, "
        f"{busy:.1f} s of processor"
    )
    print(f"{len(found.layers)} layers, {known} Jacobians, peak memory {peak:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
