"""What a fold and a capture cost here, beside another commit of this repository.

    git worktree add ../before c892fdc
    python -m benchmarks.beside_commit ../before           ratios: this code over the other
    python -m benchmarks.beside_commit ../before --write   and put them into docs/benchmarks.md

Both are run in turns, each time in a process of its own with one thread. A time is the CPU time
over that of `torch.fx`'s `fuse` (folds) or `symbolic_trace` (captures) in the same process, and the
least of all rounds counts: other work on the machine disturbs that least. Memory is the highest
resident size above that of the loaded model, over the size of its tensors.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

_MODELS = ("resnet50", "efficientnet_b0", "mobilenet_v3_large", "densenet121")
_WORK = ("fold in place", "fold a copy", "capture", "capture with shapes", "peak of a fold")


def measure(name: str, runs: int) -> dict[str, float]:
    """Return what each work costs in the tree that Python imports from."""
    from benchmarks import fold_time

    new = Path("rewrite/graph/capture.py").is_file()  # an installed one does not count
    home = importlib.import_module("rewrite.graph.capture" if new else "rewrite.capture")
    model, x = fold_time.build(name), torch.randn(1, 3, 224, 224)
    peers = {"fuse": partial(fold_time.TOOLS["torch.fx fuse"], model, (x,))}
    peers["trace"] = partial(torch.fx.symbolic_trace, copy.deepcopy(model))
    least: dict[str, float] = {}
    for number in range(runs + 1):
        fresh = copy.deepcopy(model)
        work: dict[str, Callable[[], object]] = {
            **peers,
            "fold in place": partial(fold_time.in_place, fresh, (x,)),
            "fold a copy": partial(fold_time.a_copy, model, (x,)),
            "capture": partial(home.capture, model),
            "capture with shapes": partial(home.capture, model, (x,)),
        }
        for what, function in work.items():
            gc.collect()
            start = time.process_time()
            function()
            elapsed = time.process_time() - start
            if number:
                least[what] = min(least.get(what, elapsed), elapsed)
    ratios = {
        what: least[what] / least["fuse" if what.startswith("fold") else "trace"]
        for what in _WORK[:-1]
    }
    return {**ratios, "peak of a fold": fold_time.peak(name, "ours in place")}


def _in_tree(tree: Path, name: str, runs: int) -> dict[str, float]:
    """Return `measure` of another process that imports from `tree`."""
    # -P: not from the folder of this file, whose names hide those of the standard library.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--measure", name, str(runs)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Print the table, and write it when asked to."""
    from benchmarks._table import environment, parser, publish, table

    arguments = parser(__doc__)
    arguments.add_argument("other", type=Path, help="a checkout of the other commit")
    arguments.add_argument("--rounds", type=int, default=2, help="turns of both")
    arguments.add_argument("--runs", type=int, default=5, help="runs in each process")
    options = arguments.parse_args()
    trees = {"before": options.other.resolve(), "now": Path(__file__).resolve().parent.parent}
    rows: list[list[object]] = []
    for name in _MODELS:
        found: dict[str, list[dict[str, float]]] = {which: [] for which in trees}
        for _ in range(options.rounds):
            for which, tree in trees.items():
                found[which].append(_in_tree(tree, name, options.runs))
        for what in _WORK:
            before, now = (min(one[what] for one in found[which]) for which in trees)
            rows.append([name, what, f"{before:.2f}", f"{now:.2f}", f"{now / before:.2f}"])
    header = ["model", "work", "before", "now", "now / before"]
    told = "Before: commit c892fdc, the last one without packages. 1 thread, CPU time."
    text = f"{environment('torchvision')}. {told}\n\n{table(header, rows)}"
    sys.argv = [sys.argv[0], "../before"]
    publish("beside-commit", "Beside the code before the packages", text, write=options.write)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
