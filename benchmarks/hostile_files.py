"""Files that would run something or eat the machine, each opened in a process of its own.

    python -m benchmarks.hostile_files                    writes them, opens them, prints the table
    python -m benchmarks.hostile_files old_format.pt      one of them

Each payload writes a file: after opening, none may exist. Of each file: the exit code of
`rewrite inspect` (`rewrite verify` for a graph), seconds of wall and of CPU time, the peak of
memory, and how many lines were said. The targets: code 2, one line, under 2 s of CPU time (which is
that of the clock where nothing else runs, up to 20 s elsewhere) and 500 MB, no payload.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks._table import environment, parser, publish, table

HEADER = ("file", "exit", "seconds", "CPU", "MB", "lines", "payload", "said")
SECONDS, WAIT, MEGABYTES = 2.0, 20.0, 500
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Opened:
    """What became of opening one file."""

    name: str
    code: int
    seconds: float
    cpu: float
    megabytes: float
    said: str
    ran: bool

    @property
    def is_refused(self) -> bool:
        """Whether it was refused in one line, at once, and nothing ran."""
        lines = self.said.strip().splitlines()
        small = self.cpu < SECONDS and self.seconds < WAIT and self.megabytes < MEGABYTES
        return self.code == 2 and len(lines) == 1 and small and not self.ran


def main() -> None:
    """Open every file and publish the table."""
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="FILE", help="all by default")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        # By another process: the peak of a child begins at the size of its parent.
        writer = [sys.executable, "-m", "benchmarks._hostile", str(folder)]
        done = subprocess.run(writer, check=True, capture_output=True, text=True, cwd=ROOT)
        written = done.stdout.split()
        found = [opened(folder, name) for name in chosen.names or written]
    bad = [one.name for one in found if not one.is_refused]
    body = (
        f"{environment('onnx')}. {len(found)} files: {len(found) - len(bad)} refused with exit 2 "
        f"and one line, under {SECONDS:.0f} s of CPU time and {MEGABYTES} MB"
        f"{'; not so: ' + ', '.join(bad) if bad else ''}.\n\n{table(HEADER, map(_cells, found))}"
    )
    publish("hostile-files", "Hostile files", body, write=chosen.write)
    sys.exit(bool(bad))


def opened(folder: Path, name: str) -> Opened:
    """Open a file by the command line in a fresh process."""
    is_graph = name.endswith(".onnx")
    command = ["verify"] if is_graph else ["inspect", "--input", "1x3x8x8"]
    code = "import sys; from rewrite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, str(folder / name)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=_bounded,
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.read()
    process.stdout.close()
    _, status, used = _wait(process.pid)
    process.returncode = status
    return Opened(
        name, status, time.monotonic() - begin, used.ru_utime + used.ru_stime,
        used.ru_maxrss / 1024, said,
        (folder / f"pwned_{name}").exists(),
    )  # fmt: skip


def _wait(pid: int) -> tuple[int, int, resource.struct_rusage]:
    ended, status, used = os.wait4(pid, 0)
    return ended, os.waitstatus_to_exitcode(status), used


def _bounded() -> None:
    """End a process that would take a minute or all memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))


def _cells(one: Opened) -> list[str]:
    said = " ".join(one.said.split()).removeprefix("rewrite: ").replace("|", "/")
    said = said[said.find(one.name) :] if one.name in said else said
    return [
        f"`{one.name}`", str(one.code), f"{one.seconds:.2f}", f"{one.cpu:.2f}",
        f"{one.megabytes:.0f}",
        str(len(one.said.strip().splitlines())), "ran" if one.ran else "",
        said if len(said) < 110 else said[:107] + "…",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
