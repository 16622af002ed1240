"""Several files get their names together, whatever is cut off and whatever the system refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewrite.errors import CheckpointError
from rewrite.files import publication, publishing, staging, write_bytes


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


OLD, NEW = {"a": "old"}, {"a": "new", "b": "new"}


def publish(folder: Path) -> None:
    """Write two files, of which one is there."""
    with publication() as pending:
        write_bytes(folder / "a", "new")
        write_bytes(folder / "b", "new")
        pending.publish_here()


def cut(monkeypatch: pytest.MonkeyPatch, at: int, how: BaseException) -> list[str]:
    """Raise `how` at the call number `at` of those that change a folder; list the calls."""
    calls: list[str] = []

    def counted(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == at or (len(calls) > at and not isinstance(how, Exception)):
                raise how
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(publishing.os, "link")
    counted(publishing.os, "fsync")
    counted(publishing.Path, "replace")
    counted(publishing.Path, "unlink")
    return calls


def test_a_refusal_at_any_step_leaves_everything_as_it_was(tmp_path) -> None:
    """The n-th change of the folder is refused by the system, for every n."""
    write_bytes(tmp_path / "a", "old")
    at = 0
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            calls = cut(patch, at, OSError(errno.ENOSPC, "full"))
            try:
                publish(tmp_path)
                refused = False
            except CheckpointError as error:
                refused = True
                assert "disk is full" in str(error)
            done = len(calls) < at
        publishing.finish_interrupted(tmp_path)
        assert contents(tmp_path) == (OLD if refused else NEW), (at, calls)
        if done:
            break
        (tmp_path / "b").unlink(missing_ok=True)
        (tmp_path / "a").write_text("old")
    assert at > 10


class Killed(BaseException):
    """What no handler of errors catches."""


def test_a_kill_at_any_step_is_finished_by_the_next_command(tmp_path) -> None:
    """Nothing runs any more after the n-th change, for every n: both are old, or both new."""
    seen, at = [], 2  # the two calls of fsync before any name
    while True:
        at += 1
        (tmp_path / "b").unlink(missing_ok=True)
        (tmp_path / "a").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            calls = cut(patch, at, Killed())
            with contextlib.suppress(Killed):
                publish(tmp_path)
            if len(calls) < at:
                break
        assert publishing.finish_interrupted(tmp_path) or contents(tmp_path) in (OLD, NEW)
        seen.append(contents(tmp_path))
        assert seen[-1] in (OLD, NEW), (at, calls)
    assert OLD in seen and NEW in seen
    # Once committed, never back.
    assert seen == sorted(seen, key=lambda found: len(found))


def test_what_was_interrupted_is_finished_once(tmp_path) -> None:
    assert not publishing.finish_interrupted(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, 9, Killed())
        with pytest.raises(Killed):
            publish(tmp_path)
    assert publishing.finish_interrupted(tmp_path)
    assert not publishing.finish_interrupted(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        {
            "target": "../victim",
            "new": ".victim.0123456789ab.tmp",
            "old": None,
            "inode": 1,
            "overwrite": True,
        },
        {"target": "victim", "new": "../x.tmp", "old": None, "inode": 1, "overwrite": True},
        {"target": "victim", "new": "precious", "old": None, "inode": 1, "overwrite": True},
        {
            "target": "victim",
            "new": ".victim.0123456789ab.tmp",
            "old": "precious",
            "inode": 1,
            "overwrite": True,
        },
        {"target": 3},
        7,
    ],
)
def test_a_journal_reaches_no_file_but_hidden_ones_of_its_folder(tmp_path, line) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path / "x.tmp", folder / "precious", tmp_path / "victim"):
        place.write_text("kept")
    for name in (publishing.COMMITTED, publishing.PREPARED, publishing.UNDOING):
        (folder / name).write_text(json.dumps([line]))
        assert publishing.finish_interrupted(folder)
    assert contents(folder) == {"precious": "kept"}
    assert (tmp_path / "x.tmp").read_text() == (tmp_path / "victim").read_text() == "kept"


def test_a_journal_that_is_a_link_or_cut_short_is_taken_away(tmp_path) -> None:
    (tmp_path / "elsewhere").write_text("[]")
    (tmp_path / publishing.COMMITTED).symlink_to(tmp_path / "elsewhere")
    (tmp_path / publishing.PREPARED).write_text('[{"target": "a"')
    assert publishing.finish_interrupted(tmp_path)
    assert contents(tmp_path) == {"elsewhere": "[]"}


def test_a_name_that_is_taken_meanwhile_stays_theirs(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="already exists"), publication() as pending:
        write_bytes(tmp_path / "a", "mine")
        write_bytes(tmp_path / "b", "mine", overwrite=False)
        (tmp_path / "b").write_text("theirs")
        pending.publish()
    assert contents(tmp_path) == {"b": "theirs"}


PUBLISHES = """
import os, sys
from pathlib import Path
from rewrite.files import publication, write_bytes
folder = Path(sys.argv[1])
with publication() as pending:
    for name in "abcdefgh":
        write_bytes(folder / name, "new")
    print("staged", flush=True)
    sys.stdin.readline()
    pending.publish()
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.04, 0.06, 0.1])
def test_a_kill_of_the_whole_group_leaves_all_old_or_all_new(tmp_path, delay) -> None:
    for name in "abcdefgh":
        (tmp_path / name).write_text("old")
    mark = f"MARK={tmp_path}"
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHES, str(tmp_path)], env={**os.environ, "MARK": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    found = contents(tmp_path)
    assert list(found) == list("abcdefgh") and len(set(found.values())) == 1


def running(mark: str) -> bool:
    """Say whether a process with that entry in its environment is there."""
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in place.read_bytes().split(b"\0"):
                return True
    return False


def test_a_publisher_that_dies_is_made_up_for(tmp_path, monkeypatch) -> None:
    """The process that renames is killed at once, so this one says what came of it."""
    real = staging.helper

    def dies(arguments, handles=()):
        process = real(arguments, handles)
        process.kill()
        return process

    monkeypatch.setattr(staging, "helper", dies)
    (tmp_path / "a").write_text("old")
    with pytest.raises(CheckpointError, match="interrupted"), publication() as pending:
        write_bytes(tmp_path / "a", "new")
        write_bytes(tmp_path / "b", "new")
        pending.publish()
    assert contents(tmp_path) == OLD


def test_without_another_process_files_are_published_all_the_same(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(staging, "helper", lambda *_: None)
    with publication() as pending:
        write_bytes(tmp_path / "a", "new")
        write_bytes(tmp_path / "b", "new")
        assert pending.publish() == (tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path) == NEW


def test_two_processes_at_one_pair_leave_one_pair(tmp_path) -> None:
    program = PUBLISHES.replace('"new"', "sys.argv[2]")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )
        for number in range(3)
    ]  # fmt: skip
    for process in running:
        process.communicate(b"\n")
    found = contents(tmp_path)
    assert list(found) == list("abcdefgh") and len(set(found.values())) == 1


def test_a_partial_folder_goes_with_the_process_that_wrote_it(tmp_path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from rewrite.sharded.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), []) as stage:\n"
        "    (stage / 'x').write_text('x')\n    print('begun', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert list(tmp_path.iterdir())
        process.kill()
    deadline = time.monotonic() + 5
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())


WITHOUT_LOCKS = """
import sys
from pathlib import Path

sys.modules["fcntl"] = None  # as on Windows: importing it fails

import rewrite.cli.main
import rewrite.sharded.staging
from rewrite.errors import CheckpointError
from rewrite.files import publication, publishing, write_bytes
from rewrite.sharded.staging import staged_folder

folder = Path(sys.argv[1])
assert not publishing.has_locks()
being_written = folder / ".a.0123.tmp"
being_written.write_text("of another process")
with publication() as found:
    write_bytes(folder / "a", "1")
    write_bytes(folder / "b", "2")
    found.publish()
assert being_written.exists()  # nobody can know whether it is left over
with staged_folder(folder / "c", []) as stage:
    (stage / "d").write_text("3")
assert (folder / "a").read_text() + (folder / "b").read_text() == "12"
assert (folder / "c" / "d").read_text() == "3"
(folder / ".e.partial").mkdir()
try:
    with staged_folder(folder / "e", []):
        raise AssertionError("a folder that may be written was taken over")
except CheckpointError as error:
    assert "may be writing it" in str(error), error
"""


def test_a_system_without_locks_writes_files_and_takes_nothing_away(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
