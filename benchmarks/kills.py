"""Kill commands and refuse them the disk: what they write is old, new or absent, and all is whole.

    python -m benchmarks.kills                          200 kills and 100 refusals a command
    python -m benchmarks.kills convert --kills 20 --refusals 10 --rows /dev/null

Every command that writes runs in a folder of its own, in a process forked from this one (which has
PyTorch loaded), with targets that are absent in every second run and old in the others. Half of
the kills (SIGKILL and SIGTERM in turns) come at a random moment, half at a random event: a file is
opened, linked, renamed, removed, a process is started. A refusal is an error of the system (disk
full, no permission, input/output error) at a random event that writes, or a random limit of the
size of a file. Afterwards the folder holds the inputs as they were and the targets, all old or all
new byte for byte (a folder: all its files), and nothing else; neither does the folder for
scratch files.

Commands are measured side by side (`--workers`); each one's row is appended to `kills.jsonl`, and a
row of as many kills and refusals that is there is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from benchmarks._faults import WATCHED, killed, refused
from benchmarks._optional import required
from benchmarks._table import environment, parser, publish, table
from benchmarks.sweep.rows import append, read
from benchmarks.sweep.workers import Limits, run_all
from models.randomize import randomize_norms_
from rewrite.checkpoint.load import save
from rewrite.cli.main import main as rewrite

HEADER = ("command", "kills", "old", "new", "mixed", "left over", "refusals", "old", "new",
          "mixed", "left over")  # fmt: skip

ROWS = Path(__file__).with_suffix(".jsonl")

_SHAPE = ("--input", "1x3x9x9")

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "convert": (
        ("convert", "--fold", "model.pt", "-o", "out.pt", "--report", "out.json", "--html",
         "out.html", "--onnx", "out.onnx", "--force", *_SHAPE),
        ("out.pt", "out.json", "out.html", "out.onnx"),
    ),
    "export": (
        ("export", "model.pt", "out.onnx", "--external-data", "--report", "out.json", "--force",
         *_SHAPE),
        ("out.onnx", "out.onnx.data", "out.json"),
    ),
    "verify": (
        ("verify", "model.pt", "same.pt", "--quick", "--report", "out.json", "--html", "out.html",
         "--force", *_SHAPE),
        ("out.json", "out.html"),
    ),
    "verify a graph": (
        ("verify", "wrong.onnx", "model.pt", "--repro", "out", "--report", "out.json", "--force",
         *_SHAPE),
        ("out", "out.json"),
    ),
    "compare": (
        ("compare", "model.pt", "same.pt", "--report", "out.json", "--html", "out.html", "--force",
         *_SHAPE),
        ("out.json", "out.html"),
    ),
    "inspect": (
        ("inspect", "--signal", "model.pt", "--plot", "out.svg", "--report", "out.json", "--force",
         *_SHAPE),
        ("out.svg", "out.json"),
    ),
    "apply-map": (
        ("apply-map", "map.json", "state.pt", "out.safetensors", "--force"),
        ("out.safetensors",),
    ),
    "recover": (
        ("recover", "student.pt", "--teacher", "model.pt", "--data", "data.npy", "-o", "out.pt",
         "--report", "out.json", "--plot", "out.svg", "--force"),
        ("out.pt", "out.json", "out.svg"),
    ),
    "convert a folder": (
        ("convert", "--fold", "llama", "-o", "out", "--report", "out.json", "--force"),
        ("out", "out.json"),
    ),
}  # fmt: skip
"""What each command is called with, and what it writes."""


def main() -> None:
    """Kill and refuse, and publish the table."""
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--refusals", type=int, default=100)
    options.add_argument("--workers", type=int, default=2, help="commands at a time")
    options.add_argument("--rows", type=Path, default=ROWS, help="where the rows are kept")
    chosen = options.parse_args()
    own = sys.argv
    warnings.simplefilter("ignore")
    names = chosen.names or list(COMMANDS)
    rows = list(all_measured(names, chosen))
    bad = sum(row[i] for row in rows for i in (4, 5, 9, 10))
    sys.argv = own
    body = (
        f"{environment('onnx', 'transformers')}. {len(rows)} commands: {bad} of "
        f"{sum(row[1] + row[6] for row in rows)} runs left something mixed or something over.\n\n"
        f"{table(HEADER, rows)}"
    )
    publish("kills", "Kills and refusals of the disk", body, write=chosen.write)
    sys.exit(bool(bad))


def all_measured(names: list[str], chosen: argparse.Namespace) -> Iterator[list[Any]]:
    """Yield the row of each command: the one that is kept, or one that is measured and kept."""
    asked = [chosen.kills, chosen.refusals]
    known = {
        row["name"]: row["cells"] for row in read(chosen.rows)
        if [row["cells"][1], row["cells"][6]] == asked
    }  # fmt: skip

    def work(name: str) -> dict[str, Any]:
        return {"name": name, "cells": next(measured([name], *asked))}

    pending = [name for name in names if name not in known]
    for row in run_all(pending, work, Limits(4 * 3600, 64_000), chosen.workers):
        if "cells" not in row:
            raise SystemExit(f"{row['name']}: {row['status']}: {row['error']}")
        append(chosen.rows, row)
        known[row["name"]] = row["cells"]
    yield from (known[name] for name in names)


def measured(names: list[str], kills: int, refusals: int) -> Iterator[list[Any]]:
    """Yield the row of each command."""
    # What outlives a killed command becomes a child of this process, which can wait for it.
    ctypes.CDLL(None).prctl(36, 1)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared"
        _prepare(prepared)
        for name in names:
            trial = Trial(name, prepared, Path(scratch))
            counts = [Counter[str](), Counter[str]()]
            for number in range(kills):
                counts[0].update(trial.run(number, killed))
            for number in range(refusals):
                counts[1].update(trial.run(number, refused))
            kinds = ("old", "new", "mixed", "left over")
            yield [
                f"`{name}`", kills, *(counts[0][kind] for kind in kinds),
                refusals, *(counts[1][kind] for kind in kinds),
            ]  # fmt: skip


def _prepare(folder: Path) -> None:
    """Write what the commands read."""
    folder.mkdir()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    randomize_norms_(model).eval()
    save(model, folder / "model.pt")
    save(model, folder / "same.pt")
    torch.save(model.state_dict(), folder / "state.pt")
    with torch.no_grad():
        for parameter in model[3].parameters():
            parameter.mul_(1.1)
    save(model, folder / "student.pt")
    np.save(folder / "data.npy", np.random.default_rng(0).normal(size=(64, 3, 9, 9)).astype("f4"))
    _llama(folder / "llama")
    _forked(
        ("convert", "--fold", "model.pt", "-o", "gone.pt", "--report", "map.json", *_SHAPE), folder
    )
    _forked(("export", "student.pt", "wrong.onnx", *_SHAPE), folder)
    (folder / "gone.pt").unlink()


def _llama(folder: Path) -> None:
    transformers = required("transformers")

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")


def _forked(arguments: tuple[str, ...], folder: Path) -> None:
    """Run a command in a process of its own, and load here what it loaded.

    No gradient may be computed here: the processes that are forked later could compute none.
    """
    names = folder.parent / "modules"
    process = os.fork()
    if process == 0:
        _run(arguments, folder, lambda: None, lambda: names.write_text("\n".join(sys.modules)))
    os.waitpid(process, 0)
    for name in names.read_text().splitlines():
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module(name)


def _run(
    arguments: tuple[str, ...], folder: Path, arm: Callable[[], Any], end: Callable[[], Any]
) -> NoReturn:
    """Run a command in this process and end it: nothing else of this process may run."""
    code = 70
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # two runs write the same pages, without their times
    try:
        os.chdir(folder)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.argv = ["rewrite", *arguments]
        arm()
        code = rewrite(list(arguments))
        end()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 71
    finally:
        os._exit(code)


class Trial:
    """One command: what it reads and writes, and how long it takes."""

    def __init__(self, name: str, prepared: Path, scratch: Path) -> None:
        self.arguments, self.targets = COMMANDS[name]
        self.prepared = prepared
        self.folder, self.temporary = scratch / "work", scratch / "temporary"
        self._fresh(filled=False)
        _forked(self.arguments, self.folder)
        for _ in range(2):
            self._fresh(filled=False)
            begin = time.monotonic()
            code = self._fork(lambda events, seconds: None, random.Random(0))
            self.seconds = time.monotonic() - begin
        self.inputs = _contents(prepared)
        self.new = {name: _content(self.folder / name) for name in self.targets}
        missing = [name for name, content in self.new.items() if content is None]
        if missing:
            raise SystemExit(f"{name}: exit {code}, {missing} not written")
        self.events = self._count()

    def run(self, number: int, fault: Callable[..., Any]) -> Iterator[str]:
        """Yield what a run with a fault left: old, new or mixed; and whether anything else."""
        draw = random.Random(f"{fault.__name__}{number}")
        filled = bool(number % 2) and "out" not in self.targets
        self._fresh(filled=filled)
        self._fork(fault(draw, number, self), draw)
        beside = {n: c for n, c in _contents(self.folder).items() if n not in self.targets}
        over = beside != self.inputs or any(self.temporary.iterdir())
        found = {
            name: self._kind(name, _content(self.folder / name), b"old" if filled else None)
            for name in self.targets
        }
        whole = set(found.values()) in ({"old"}, {"new"})
        yield found[self.targets[0]] if whole else "mixed"
        if over:
            yield "left over"
        if over or not whole:
            more = sorted(set(beside) ^ set(self.inputs)) + list(map(str, self.temporary.iterdir()))
            print(f"{self.arguments[0]}, {fault.__name__} {number}: {found} {more}", flush=True)

    def _kind(self, name: str, found: Any, old: Any) -> str:
        if found == old:
            return "old"
        return "new" if found == self.new[name] else f"another: {str(found)[:200]}"

    def _fresh(self, *, filled: bool) -> None:
        for place in (self.folder, self.temporary):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.prepared, self.folder)
        self.temporary.mkdir()
        for name in self.targets if filled else ():
            (self.folder / name).write_bytes(b"old")

    def _count(self) -> int:
        """Return how many events a run has."""
        counted = self.folder.parent / "events"
        self._fresh(filled=False)

        def arm() -> None:
            seen = 0

            def hook(event: str, _: Any) -> None:
                nonlocal seen
                if event in WATCHED:
                    seen += 1
                    os.pwrite(handle, b"%9d" % seen, 0)

            handle = os.open(counted, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            sys.addaudithook(hook)

        self._fork(lambda *_: arm(), random.Random(0))
        return int(counted.read_bytes())

    def _fork(self, fault: Callable[[int, float], Any], draw: random.Random) -> int:
        """Run the command in a process of its own, and wait for all that it left running."""
        process = os.fork()
        if process == 0:
            _run(self.arguments, self.folder, lambda: self._arm(fault), lambda: None)
        after = getattr(fault, "after", None)
        if after is not None:
            time.sleep(after(self.seconds))
            os.kill(process, fault.signal)  # type: ignore[attr-defined]
        status = -1
        while True:
            try:
                ended, found = os.waitpid(-1, 0)
            except ChildProcessError:
                return status
            status = os.waitstatus_to_exitcode(found) if ended == process else status

    def _arm(self, fault: Callable[[int, float], Any]) -> None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        fault(getattr(self, "events", 0), getattr(self, "seconds", 0.0))


def _content(place: Path) -> Any:
    """Return a file's bytes, or of a folder all names and bytes; None for what is not there."""
    if place.is_dir():
        return _contents(place)
    return place.read_bytes() if place.exists() else None


def _contents(folder: Path) -> dict[str, Any]:
    return {path.name: _content(path) for path in folder.iterdir()}


if __name__ == "__main__":
    main()
