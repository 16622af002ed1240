"""Time and memory of one whole `rewrite convert` command, against what it cannot do without.

The floor is `import torch`, load and save of the same file. `torch.fx.experimental.optimization`
does comparable work on it: load, trace, edit every norm, save.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import _process, _table

TARGET = 1.25

FLOOR = """
import torch
model = torch.load("model.pt", weights_only=False)
torch.save(model, "floor.pt")
"""

FX_FUSE = """
import torch
from torch.fx.experimental.optimization import fuse
model = torch.load("model.pt", weights_only=False)
torch.save(fuse(model.eval()), "fused.pt")
"""

MODEL = """
import torch, torchvision
torch.manual_seed(0)
torch.save(torchvision.models.get_model({name!r}).eval(), "model.pt")
"""


def commands(options: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the rows: their labels and the commands behind them."""
    convert = (*_process.REWRITE, "convert", "--bn-to-gn", *options)
    return {
        "floor: `import torch`, load, save": (sys.executable, "-c", FLOOR),
        "`rewrite convert --bn-to-gn`": (*convert, "--force", "model.pt"),
        "`rewrite convert --bn-to-gn --dry-run`": (*convert, "--dry-run", "model.pt"),
        "`torch.fx.experimental.optimization.fuse`, load, save": (sys.executable, "-c", FX_FUSE),
        "`rewrite --help`": (*_process.REWRITE, "--help"),
    }


def main() -> None:
    """Measure, print the table, and write it into the page when asked to."""
    parser = _table.parser(__doc__)
    parser.add_argument("--model", default="resnet50", help="a torchvision model")
    parser.add_argument("--repeats", type=int, default=7)
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        subprocess.run([sys.executable, "-c", MODEL.format(name=args.model)], cwd=cwd, check=True)
        size = (cwd / "model.pt").stat().st_size / 1e6
        runs = _process.interleave(commands(options), cwd, args.repeats)
    floor, convert, *_ = (_process.middle(several) for several in runs.values())
    body = (
        f"A pickled torchvision {args.model} ({size:.0f} MB), whole commands; median of"
        f" {args.repeats} interleaved runs, ratios to the floor.\n"
        f"{_table.environment('torchvision')}.\n\n"
        f"{_table.table(_process.HEADER, _process.rows(runs))}\n\n"
        f"Target: convert takes at most {TARGET} × the floor's time; measured"
        f" {convert.wall / floor.wall:.2f} (wall), {convert.cpu / floor.cpu:.2f} (CPU)."
    )
    _table.publish("convert-time", "Time of one conversion", body, write=args.write)


if __name__ == "__main__":
    main()
