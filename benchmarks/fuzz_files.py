"""Mutants of files, each opened: a file is a model or one line, never a traceback or a hang.

    python -m benchmarks.fuzz_files --mutants 1000

A mutant has bytes flipped, cut, doubled or overwritten; in the pickles also single opcodes that are
exchanged. The archives are mutated inside of their members, so that checksums still hold.
"""

from __future__ import annotations

import io
import random
import signal
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save as safetensors
from torch import nn

from benchmarks._table import parser, table
from rewrite.checkpoint.load import load, save
from rewrite.errors import RewriteError

FACTORY = 'torch.nn:Linear({"in_features": 3, "out_features": 3})'
OPCODES = bytes(range(0x28, 0x98))


def main() -> None:
    """Mutate and count."""
    options = parser(__doc__)
    options.add_argument("--mutants", type=int, default=1000)
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hangs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (data, mutate, factory) in _formats(Path(folder)).items():
            found, slowest = _run(Path(folder) / name, data, mutate, factory, chosen.mutants)
            rows.append((name, chosen.mutants, found["opened"], found["refused"],
                         found["crashed"], found["hung"], f"{slowest:.2f} s"))  # fmt: skip
    print(table(("file", "mutants", "opened", "refused", "tracebacks", "hangs", "slowest"), rows))


def _hangs(*_: object) -> None:
    raise TimeoutError


Mutate = Callable[[bytes, random.Random], bytes]


def _formats(folder: Path) -> dict[str, tuple[bytes, Mutate, str | None]]:
    linear = nn.Linear(3, 3)
    state = io.BytesIO()
    torch.save({"state_dict": linear.state_dict(), "epoch": 3}, state)
    old = io.BytesIO()
    torch.save(nn.Sequential(linear), old, _use_new_zipfile_serialization=False)
    graph = save(torch.fx.symbolic_trace(nn.Sequential(linear, nn.ReLU())), folder / "graph")
    whole = save(nn.Sequential(linear, nn.ReLU()), folder / "whole").read_bytes()
    program = io.BytesIO()
    torch.export.save(torch.export.export(linear.eval(), (torch.ones(1, 3),)), program)
    return {
        "module.pt": (whole, _in_member("data.pkl", _bytes), None),
        "opcodes.pt": (whole, _in_member("data.pkl", _opcodes), None),
        "state.pt": (state.getvalue(), _in_member("data.pkl", _bytes), FACTORY),
        "archive.pt": (whole, _bytes, None),
        "old.pt": (old.getvalue(), _bytes, None),
        "graph.pt": (graph.read_bytes(), _in_member("data.pkl", _bytes), None),
        "program.pt2": (program.getvalue(), _in_member("model.json", _bytes), None),
        "state.safetensors": (safetensors(linear.state_dict()), _bytes, FACTORY),
    }


def _bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                changed[place] = draw.randrange(256)
            case 2:
                del changed[place : place + draw.randrange(1, 9)]
            case _:
                changed[place:place] = changed[place : place + draw.randrange(1, 40)]
        changed = changed or bytearray(b"x")
    return bytes(changed)


def _opcodes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    places = [index for index, byte in enumerate(changed) if byte in OPCODES]
    for place in draw.sample(places, 2):
        changed[place] = draw.choice(OPCODES)
    return bytes(changed)


def _in_member(end: str, mutate: Mutate) -> Mutate:
    def change(data: bytes, draw: random.Random) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, mutate(content, draw) if name.endswith(end) else content)
        return made.getvalue()

    return change


def _run(
    path: Path, data: bytes, mutate: Mutate, factory: str | None, count: int
) -> tuple[Counter[str], float]:
    found: Counter[str] = Counter()
    slowest = 0.0
    for seed in range(count):
        path.write_bytes(mutate(data, random.Random(seed)))
        start = time.process_time()
        signal.alarm(10)
        try:
            load(path, factory=factory)
            found["opened"] += 1
        except RewriteError:
            found["refused"] += 1
        except TimeoutError:
            found["hung"] += 1
        except (Exception, SystemExit) as error:  # noqa: BLE001 - counting them is the point
            found["crashed"] += 1
            print(f"{path.name}, seed {seed}: {type(error).__name__}: {error}"[:160])
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.process_time() - start)
    return found, slowest


if __name__ == "__main__":
    main()
