"""Run a function once a name, each in a process of its own with a limit of memory and of time.

The packages are imported once, here; each process is a fork of this one and starts in milliseconds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.sweep.rows import Row


@dataclass(frozen=True)
class Limits:
    """What one process may use: seconds of wall time, megabytes beyond those of its parent."""

    seconds: float
    megabytes: int


@dataclass(frozen=True)
class _Job:
    name: str
    process: BaseProcess
    answer: Connection
    deadline: float


def run_all(
    names: Iterable[str], function: Callable[[str], Row], limits: Limits, workers: int
) -> Iterator[Row]:
    """Yield `function(name)` for every name, as each is done.

    A process that is out of time or memory, or that crashes, yields a row with that status.
    """
    context = multiprocessing.get_context("fork")
    pending = iter(names)
    running: list[_Job] = []
    while True:
        while len(running) < workers and (name := next(pending, None)) is not None:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(function, name, sender, limits))
            process.start()
            sender.close()
            running.append(_Job(name, process, receiver, time.monotonic() + limits.seconds))
        if not running:
            return
        wait([job.answer for job in running], timeout=0.5)
        for job in list(running):
            row = _finished(job, limits)
            if row is not None:
                running.remove(job)
                yield row


def _work(function: Callable[[str], Row], name: str, sender: Connection, limits: Limits) -> None:
    os.setsid()
    gc.disable()  # the process ends with its model; walks over all imported packages are slow
    used = int(_status_kilobytes("VmSize")) * 1024
    limit = used + limits.megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        row = function(name)
    except MemoryError:
        row = {"name": name, "status": "memory", "error": f"more than {limits.megabytes} MB"}
    except Exception as error:  # noqa: BLE001 - the parent prints it as the row of this name
        text = f"{type(error).__name__}: {error}"
        status = "memory" if "allocate memory" in text else "failed"
        row = {"name": name, "status": status, "error": text[:300]}
    sender.send(row)
    sender.close()


def _finished(job: _Job, limits: Limits) -> Row | None:
    """Return the row of a job that is over, and make sure that its process is."""
    row: Row | None = None
    if job.answer.poll():
        try:
            row = job.answer.recv()
        except EOFError:
            job.process.join()
            row = {
                "name": job.name,
                "status": "crashed",
                "error": f"exit code {job.process.exitcode}",
            }
    elif time.monotonic() > job.deadline:
        row = {"name": job.name, "status": "timeout", "error": f"more than {limits.seconds:.0f} s"}
        job.process.kill()
    if row is not None:
        job.process.join(10)
        if job.process.is_alive():
            job.process.kill()
        job.answer.close()
    return row


def _status_kilobytes(key: str) -> str:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(line.split()[1] for line in lines if line.startswith(key))
