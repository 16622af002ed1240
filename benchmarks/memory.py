"""Peak memory of converting a 500 MB model, as a multiple of the model's size.

    (peak resident set - resident set after the imports) / size of the model's tensors

Each row is a process of its own, which loads the model from a file. `vgg16_bn` keeps nine tenths
of its weights in linear layers that a norm swap leaves alone; in `wide_resnet101_2` nearly every
weight belongs to a convolution in front of a norm. The floor holds the loaded model and does
nothing; `copy.deepcopy` is what a conversion costs that copies first. `keep="affine"` replaces the
norms alone; the default also moves their statistics into the convolutions before them, whose
weights then exist twice: the original's, which stays as it was, and the result's. The command has
no use for the original and consumes it; the row before it is the same in Python.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import _table

TARGET = 1.2
MODELS = ("vgg16_bn", "wide_resnet101_2")

BUILD = """
import torch, torchvision
torch.manual_seed(0)
model = torchvision.models.get_model({name!r}).eval()
torch.save(model, "model.pt")
tensors = [*model.parameters(), *model.buffers()]
print(sum(tensor.nbytes for tensor in tensors) / 1e6)
"""

IMPORTS = """
import copy, sys
import torch, torchvision
import rewrite, rewrite.cli.main
from rewrite import convert, load
from passes import BatchNormToGroupNorm

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))

# What a first use imports (tracing, verification) belongs to the baseline.
small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
convert(small, [BatchNormToGroupNorm(num_groups=4)], example_inputs=(torch.rand(1, 3, 8, 8),))
baseline = status("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
"""

REPORT = """
print(status("VmHWM") - baseline)
"""

CONVERT = 'model = load("model.pt"); result = convert(model, [BatchNormToGroupNorm({})]{})'
EXAMPLE = ", example_inputs=(torch.rand(1, 3, 224, 224),)"

BODIES = {
    "load": 'model = load("model.pt")',
    "load, `copy.deepcopy`": 'model = load("model.pt"); other = copy.deepcopy(model)',
    'load, `convert`, `keep="affine"`': CONVERT.format("keep='affine'", ""),
    "load, `convert`": CONVERT.format("", ""),
    "load, `convert` with an example input": CONVERT.format("", EXAMPLE),
    "the same with `consume=True`": CONVERT.format("", f"{EXAMPLE}, consume=True"),
    "the command `rewrite convert --bn-to-gn model.pt`": (
        'rewrite.cli.main.main(["convert", "--bn-to-gn", "--force", "--quiet", "model.pt"])'
    ),
}


def measure(name: str, cwd: Path) -> list[list[str]]:
    """Return the rows of one model."""
    size = float(_output(BUILD.format(name=name), cwd))
    rows = []
    for label, body in BODIES.items():
        extra = float(_output(IMPORTS + body + REPORT, cwd).splitlines()[-1])
        rows.append([f"{name}: {label}", f"{size:.0f}", f"{extra:.0f}", f"{extra / size:.2f}"])
        print(rows[-1], file=sys.stderr)
    return rows


def _output(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> None:
    """Measure, print the table, and write it into the page when asked to."""
    parser = _table.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="torchvision models")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, Path(folder))
    header = ["model and work", "size, MB", "peak over imports, MB", "multiple of the size"]
    body = (
        "Peak resident memory over that after the imports."
        f" {_table.environment('torchvision')}.\n\n"
        f"{_table.table(header, rows)}\n\n"
        f"Target for a conversion: {TARGET}. By default the statistics of each norm move into the"
        " layer before it, whose weight then exists twice: the original's, which stays as it was,"
        " and the result's. The command consumes the original, and so does `consume=True`."
    )
    _table.publish("memory", "Memory of one conversion", body, write=args.write)


if __name__ == "__main__":
    main()
