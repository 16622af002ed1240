"""How long a fold takes, and how much memory, beside torch.fx's fuser and torchao's pt2e.

    python -m benchmarks.fold_time            ratios of the least of interleaved runs in one process
    python -m benchmarks.fold_time --write    and put them into docs/benchmarks.md
    python -m benchmarks.fold_time --verified a whole `convert` with its verification, in forwards

`ours in place` is `apply_pass`, `ours, a copy` is `rewrite.convert` without verification: like
torch.fx's `fuse` it leaves the argument alone. pt2e's time includes the export that it needs. The
times are CPU time of one thread, which other work on the machine disturbs least. The memory is the
highest resident size above that of the loaded model, in a process of its own, over the size of the
model's tensors. The model of a billion parameters is in bfloat16.

`--verified` is `convert` with an example input of 224x224 and its verification, over one forward of
that model in float64; `capture` with shapes over `torch.fx.symbolic_trace`; and what shapes cost of
that, which is `capture` with them less `capture` without.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.capture_time import fastest
from benchmarks.folders import pt2e, torch_fx
from models import randomize_norms_

_MODELS = (
    "resnet50", "efficientnet_b0", "mobilenet_v3_large", "densenet121", "1 B parameters",
)  # fmt: skip


_HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


class _Billion(nn.Module):
    """A billion parameters in convolutions and linear layers, each with a norm."""

    def __init__(self) -> None:
        super().__init__()
        width = 4096
        self.stem = nn.Sequential(nn.Conv2d(3, 512, 3, bias=False), nn.BatchNorm2d(512), nn.ReLU())
        layers: list[nn.Module] = []
        for _ in range(28):
            layers += [nn.Conv2d(512, 1024, 3, bias=False), nn.BatchNorm2d(1024), nn.ReLU()]
            layers += [nn.Conv2d(1024, 512, 3, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(512, width), nn.BatchNorm1d(width), nn.ReLU(),
            *(m for _ in range(43) for m in self._wide(width)),
        )  # fmt: skip

    @staticmethod
    def _wide(width: int) -> tuple[nn.Module, ...]:
        return nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def _billion() -> nn.Module:
    """Return the model of a billion parameters, in bfloat16, without the cost of a random start."""
    with torch.device("meta"):
        model = _Billion().bfloat16()
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.fill_(0.5 if "running" in name or tensor.dim() < 2 else 0.01)
    return model


def build(name: str) -> nn.Module:
    """Return one of the measured models, in eval mode, its norms as different as trained ones."""
    if name == "1 B parameters":
        return _billion()
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = randomize_norms_(torchvision.models.get_model(name))
    return model.eval()


def in_place(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold the model itself."""
    from passes import FoldNorm
    from rewrite.protocol import apply_pass

    return apply_pass(FoldNorm(), model).model


def a_copy(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Fold a copy that shares what does not change."""
    import rewrite
    from passes import FoldNorm

    return rewrite.convert(model, [FoldNorm()], verify=False).model


TOOLS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Any]] = {
    "torch.fx fuse": torch_fx,
    "ours, a copy": a_copy,
    "ours in place": in_place,
    "torchao pt2e": pt2e,
}


def verified(names: Sequence[str], runs: int) -> Iterator[list[object]]:
    """Yield a row a model: `convert` and its verification in forwards, shapes in traces."""
    import torchvision

    import rewrite
    from passes import FoldNorm
    from rewrite.graph.capture import capture

    x = torch.randn(1, 3, 224, 224)
    for name in names:
        torch.manual_seed(0)
        model = randomize_norms_(torchvision.models.get_model(name)).eval()
        wide, traced = copy.deepcopy(model).double(), copy.deepcopy(model)
        functions: list[Callable[[], object]] = [
            partial(wide, x.double()),
            partial(rewrite.convert, model, [FoldNorm()], example_inputs=x),
            partial(torch.fx.symbolic_trace, traced),
            partial(capture, model),
            partial(capture, model, x),
        ]
        with torch.no_grad():
            forward, whole, trace, plain, shapes = fastest(functions, runs, time.process_time)
        yield [
            name, f"{forward:.3f}", f"{whole:.3f}", f"{whole / forward:.2f}",
            f"{shapes / trace:.2f}", f"{(shapes - plain) / trace:.2f}",
        ]  # fmt: skip


def seconds(name: str, runs: int) -> dict[str, float]:
    """Return the least time of each tool over interleaved runs; the first round does not count."""
    model = build(name)
    inputs = (torch.randn(2, 3, 64, 64),)
    times: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    for round_number in range(runs + 1):
        for tool, function in TOOLS.items():
            once = name.startswith("1 B") or round_number > 1 or not _HAS_TORCHAO
            if tool == "torchao pt2e" and once:
                continue
            given = copy.deepcopy(model) if tool == "ours in place" else model
            gc.collect()
            start = time.process_time()
            folded = function(given, inputs)
            elapsed = time.process_time() - start
            del folded, given
            if round_number or tool == "torchao pt2e":
                times[tool].append(elapsed)
    return {tool: min(t) for tool, t in times.items() if t}


def peak(name: str, tool: str) -> float:
    """Return the peak above the loaded model over the model's size, in a new process."""
    command = [sys.executable, "-m", "benchmarks.fold_time", "--peak", name, "--tool", tool]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _measure_peak(name: str, tool: str) -> float:
    """Fold once in this process and read the high-water mark of the resident size."""
    warm, inputs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), (torch.randn(1),)
    TOOLS[tool](warm, inputs)
    model = build(name)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    gc.collect()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write("5")
    before = _status("VmRSS")
    TOOLS[tool](model, inputs)
    return (_status("VmHWM") - before) / size


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the table, and write it when asked to."""
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=5, help="rounds that count")
    arguments.add_argument("--verified", action="store_true", help="time `convert` as a whole")
    arguments.add_argument("--models", nargs="+", default=list(_MODELS))
    arguments.add_argument("--peak", help="measure one model's peak memory and print the ratio")
    arguments.add_argument("--tool", default="ours in place", choices=TOOLS)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.verified:
        names = [name for name in options.models if not name.startswith("1 B")]
        header = [
            "model", "forward, s", "convert, s", "in forwards",
            "capture with shapes / symbolic_trace", "shapes alone / symbolic_trace",
        ]  # fmt: skip
        body = table(header, verified(names, options.runs))
        text = f"{environment('torchvision')}, 1 thread, CPU time\n\n{body}"
        publish("fold-verified", "A fold with its verification", text, write=options.write)
        return
    if options.peak:
        print(_measure_peak(options.peak, options.tool))
        return
    rows: list[list[object]] = []
    for name in options.models:
        times = seconds(name, 2 if name.startswith("1 B") else options.runs)
        base = times["torch.fx fuse"]
        for tool, value in times.items():
            memory = "" if tool == "torchao pt2e" else f"{peak(name, tool):.2f}"
            rows.append([name, tool, f"{value:.3f}", f"{value / base:.2f}", memory])
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ["model", "tool", "CPU seconds", "x torch.fx fuse", "peak / model size"]
    beside = ("torchao",) if _HAS_TORCHAO else ()
    text = f"{environment(*beside)}, 1 thread\n\n{table(header, rows)}"
    publish("fold-time", "Time and memory of a fold", text, write=options.write)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
