"""Mutants of files, each opened: a file is a model or one line, never a traceback or a hang.

    python -m benchmarks.fuzz_files --mutants 1000

A mutant has bytes flipped, cut, doubled or overwritten; in the pickles also single opcodes that are
exchanged. The archives are mutated inside of their members, so that checksums still hold. Arrays
are read as inputs, ONNX graphs verified, key maps applied to a checkpoint. Each format runs in a
process of its own, so that a crash is counted and the rest goes on.
"""

from __future__ import annotations

import io
import logging
import os
import random
import signal
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import numpy as np
import onnx
import torch
from safetensors.torch import save as safetensors
from torch import nn

from benchmarks._table import environment, parser, publish, table
from rewrite import convert
from rewrite.checkpoint.load import load, save
from rewrite.equivalence.verification import Level
from rewrite.errors import RewriteError
from rewrite.fold.replay import apply_report
from rewrite.fold.report_file import read_report
from rewrite.onnx.export import export
from rewrite.onnx.verify import verify_onnx
from rewrite.runtime.stored.input_files import load_inputs

FACTORY = 'torch.nn:Linear({"in_features": 3, "out_features": 3})'
OPCODES = bytes(range(0x28, 0x98))


def main() -> None:
    """Mutate and count."""
    options = parser(__doc__)
    options.add_argument("formats", nargs="*", metavar="FILE", help="all by default")
    options.add_argument("--mutants", type=int, default=1000)
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hangs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        formats = {**_checkpoints(place), **_others(place)}
        for name in chosen.formats or formats:
            found, slowest = _apart(place / name, *formats[name], chosen.mutants)
            kinds = ("opened", "refused", "traceback", "hung", "crash")
            counts = (found[kind] for kind in kinds)
            rows.append((name, chosen.mutants, *counts, f"{slowest:.2f} s"))
    header = ("file", "mutants", "opened", "refused", "tracebacks", "hangs", "crashes", "slowest")
    body = f"{environment('onnx', 'onnxruntime')}.\n\n{table(header, rows)}"
    publish("fuzz-files", "Mutants of files", body, write=chosen.write)


def _hangs(*_: object) -> None:
    raise TimeoutError


Mutate = Callable[[bytes, random.Random], bytes]
Open = Callable[[Path], object]
Format = tuple[bytes, Mutate, Open]


def _with_factory(path: Path) -> object:
    return load(path, factory=FACTORY)


def _checkpoints(folder: Path) -> dict[str, Format]:
    """Return what `load` opens: the file, how it is mutated, and how it is opened."""
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
        "module.pt": (whole, _in_member("data.pkl", _bytes), load),
        "opcodes.pt": (whole, _in_member("data.pkl", _opcodes), load),
        "state.pt": (state.getvalue(), _in_member("data.pkl", _bytes), _with_factory),
        "archive.pt": (whole, _bytes, load),
        "old.pt": (old.getvalue(), _bytes, load),
        "graph.pt": (graph.read_bytes(), _in_member("data.pkl", _bytes), load),
        "program.pt2": (program.getvalue(), _in_member("model.json", _bytes), load),
        "state.safetensors": (safetensors(linear.state_dict()), _bytes, _with_factory),
    }


def _others(folder: Path) -> dict[str, Format]:
    """Return what is no checkpoint: arrays, graphs, key maps."""
    arrays, one = io.BytesIO(), io.BytesIO()
    np.savez(arrays, x=np.ones((2, 3), "f4"), y=np.arange(4))
    np.save(one, np.ones((2, 3), "f4"))
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    export(norm, folder / "m.onnx", example_inputs=(torch.ones(2, 3),), verify=False)
    loop = _loop()
    report = convert(norm, "fold", example_inputs=(torch.ones(2, 3),)).report.to_json()
    state = norm.state_dict()

    def apply(path: Path) -> object:
        return apply_report(read_report(path), state)

    def verify(path: Path) -> object:
        return verify_onnx(path, level=Level.QUICK)

    def read(path: Path) -> object:
        return load_inputs(str(path))

    return {
        "inputs.npz": (arrays.getvalue(), _in_member(".npy", _bytes), read),
        "archive.npz": (arrays.getvalue(), _bytes, read),
        "inputs.npy": (one.getvalue(), _bytes, read),
        "graph.onnx": ((folder / "m.onnx").read_bytes(), _bytes, verify),
        "loop.onnx": (loop, _bytes, verify),
        "map.json": (report.encode(), _bytes, apply),
    }


def _loop() -> bytes:
    """Return a graph with a loop, a branch and a constant."""
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["going"], ["goes"]),
            onnx.helper.make_node("Mul", ["v", "two"], ["w"]),
        ],
        "body",
        [value("i", kind.INT64, []), value("going", kind.BOOL, []), value("v", kind.FLOAT, [2])],
        [value("goes", kind.BOOL, []), value("w", kind.FLOAT, [2])],
        [onnx.helper.make_tensor("two", kind.FLOAT, [], [2.0])],
    )
    trips = onnx.helper.make_tensor("trips", kind.INT64, [], [3])
    go = onnx.helper.make_tensor("go", kind.BOOL, [], [True])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Loop", ["trips", "go", "x"], ["y"], body=body)], "g",
        [value("x", kind.FLOAT, [2])], [value("y", kind.FLOAT, [2])], [trips, go],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 17)]
    made: bytes = onnx.helper.make_model(
        graph, opset_imports=opset, ir_version=8
    ).SerializeToString()
    return made


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


def _apart(
    path: Path, data: bytes, mutate: Mutate, opened: Open, count: int
) -> tuple[Counter[str], float]:
    """Open all mutants in a process of its own; begin another behind one that it died of."""
    total, slowest, first = Counter[str](), 0.0, 0
    while first < count:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as said:
                _run(path, data, mutate, opened, range(first, count), said)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as said:
            for line in said:
                kind, seconds = line.split()
                total[kind] += 1
                slowest = max(slowest, float(seconds))
                first += 1
        if os.waitpid(process, 0)[1]:
            print(f"{path.name}, seed {first}: the process died")
            total["crash"] += 1
            first += 1
    return total, slowest


def _run(
    path: Path, data: bytes, mutate: Mutate, opened: Open, seeds: Iterable[int], said: TextIO
) -> None:
    for seed in seeds:
        path.write_bytes(mutate(data, random.Random(seed)))
        start = time.process_time()
        signal.alarm(20)
        try:
            opened(path)
            kind = "opened"
        except RewriteError:
            kind = "refused"
        except TimeoutError:
            kind = "hung"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - counting them is the point
            kind = "traceback"
            print(f"{path.name}, seed {seed}: {type(error).__name__}: {error}"[:160], flush=True)
        finally:
            signal.alarm(0)
        print(kind, time.process_time() - start, file=said, flush=True)


if __name__ == "__main__":
    main()
