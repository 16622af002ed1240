"""Run whole processes, interleaved, and measure each: wall time, CPU time and peak memory.

Rows of one benchmark take turns, so that a slow minute of the machine slows all of them, and what
is reported is the median and its ratio to the first row.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

# The console script `rewrite`, in the interpreter that runs the benchmark.
REWRITE = (sys.executable, "-c", "import sys; from rewrite.cli.main import main; sys.exit(main())")


@dataclass(frozen=True)
class Run:
    """What one process took."""

    wall: float
    """Seconds from start to exit."""
    cpu: float
    """Seconds of user and system time, over all threads."""
    peak: float
    """Largest resident set, in MB (10^6 bytes)."""


def run(command: Sequence[str], cwd: Path) -> Run:
    """Run a command to its end and measure it.

    Raises:
        subprocess.CalledProcessError: the command failed; its output is in the message.
    """
    log = cwd / "output.log"
    start = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT)
        # wait4 gives this child's own usage; getrusage(RUSAGE_CHILDREN) the maximum over all.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, log.read_text())
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(wall, usage.ru_utime + usage.ru_stime, peak / 1e6)


def interleave(
    commands: Mapping[str, Sequence[str]], cwd: Path, repeats: int
) -> dict[str, list[Run]]:
    """Run every command once to warm the disk cache, then `repeats` times in turns."""
    for command in commands.values():
        run(command, cwd)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(run(command, cwd))
    return runs


def middle(runs: Sequence[Run]) -> Run:
    """Return the median of each number."""
    return Run(
        median(r.wall for r in runs), median(r.cpu for r in runs), median(r.peak for r in runs)
    )


def rows(runs: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """Return a table row for each command: time and memory, with ratios to the first command."""
    first = middle(next(iter(runs.values())))
    return [
        [
            name,
            f"{row.wall:.2f}",
            f"{row.wall / first.wall:.2f}",
            f"{row.cpu:.2f}",
            f"{row.cpu / first.cpu:.2f}",
            f"{row.peak:.0f}",
            f"{row.peak / first.peak:.2f}",
        ]
        for name, row in ((name, middle(several)) for name, several in runs.items())
    ]


HEADER = ["command", "wall, s", "ratio", "CPU, s", "ratio", "peak, MB", "ratio"]
