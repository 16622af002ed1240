"""Weight decay by structure and by name: which parameters each puts into the wrong group.

    python -m benchmarks.parameter_groups [--draw 100] [--write] [PACKAGE:ARCHITECTURE ...]

Right is, by the class of the module that holds it: the matrix of a layer (`nn.Linear`,
convolutions, recurrent layers, attention) decays, parameters of norms and biases do not. Bare
parameters of other modules, which no class speaks for, are counted beside, and those that decay
are named by class. The usual rule by name: no decay for what is one-dimensional or whose name
contains "bias" or "norm". `--draw` adds architectures of the sweep, drawn with a fixed seed.
"""

from __future__ import annotations

import json
import logging
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from benchmarks._table import environment, parser, publish, table
from benchmarks.corpus import QUICK, UnbuildableError, installed, make
from rewrite.training import parameter_groups

SWEEP = Path(__file__).parent / "coverage.jsonl"
_SEED, _LARGEST = 19, 100_000_000
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and publish."""
    options = parser(__doc__)
    options.add_argument("--draw", type=int, default=0, help="architectures beside those named")
    options.add_argument("names", nargs="*", default=QUICK, metavar="PACKAGE:ARCHITECTURE")
    chosen = options.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    counts: list[tuple[str, list[int]]] = []
    bare: Counter[str] = Counter()
    left = []
    names = [*chosen.names, *draw(chosen.draw, exclude=chosen.names)]
    for name in filter(installed, names):
        try:
            counts.append((name, count(make(name), bare)))
        except UnbuildableError:
            left.append(name)
    total = [sum(column) for column in zip(*(row for _, row in counts), strict=True)]
    by_name = [(name, row) for name, row in counts if row[1] or row[2] or row[3] != row[4]]
    rows = [[f"all {len(counts)}", *total], *([name, *row] for name, row in by_name)]
    header = ["architectures", "judged by class", "wrong here", "wrong by name"]
    header += ["bare, decayed here", "bare, decayed by name"]
    kinds = ", ".join(f"`{kind}` ({n})" for kind, n in bare.most_common()) or "none"
    body = (
        f"{environment('timm')}. Architectures in which both rules agree have no row; not built: "
        f"{', '.join(left) or 'none'}.\n\n{table(header, rows)}\n\n"
        f"Bare parameters that decay here: {kinds}."
    )
    publish("parameter-groups", "Weight decay by structure", body, write=chosen.write)


def draw(number: int, exclude: Sequence[str]) -> list[str]:
    """Return `number` architectures of the sweep, the same at every call."""
    rows = map(json.loads, SWEEP.read_text(encoding="utf-8").splitlines())
    known = {row["name"] for row in rows if row.get("parameters", _LARGEST) < _LARGEST}
    rest = sorted(name for name in known - set(exclude) if installed(name))
    return random.Random(_SEED).sample(rest, min(number, len(rest)))


def count(model: nn.Module, bare: Counter[str]) -> list[int]:
    """Return judged parameters, wrong ones here and by name, bare ones decayed here and by name.

    Those that decay here are added to `bare`, by class.
    """
    decayed = set(parameter_groups(model, 0.1)[0]["names"])
    result = [0, 0, 0, 0, 0]
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False):
            if not parameter.requires_grad:
                continue
            named = parameter.dim() > 1 and not any(w in key.lower() for w in ("bias", "norm"))
            wanted = right(module, key.rpartition(".")[2])
            if wanted is None:
                if key in decayed:
                    bare[f"{type(module).__name__}.{key.rpartition('.')[2]}"] += 1
                result[3] += key in decayed
                result[4] += named
                continue
            result[0] += 1
            result[1] += (key in decayed) != wanted
            result[2] += named != wanted
    return result


def right(module: nn.Module, key: str) -> bool | None:
    """Return whether a parameter has to decay, by the class of its module; None: no class says."""
    if isinstance(module, _LAYERS):
        return "weight" in key
    kinds = [kind.__name__ for kind in type(module).__mro__]
    return False if any(norm in kind for kind in kinds for norm in _NORMS) else None


if __name__ == "__main__":
    main()
