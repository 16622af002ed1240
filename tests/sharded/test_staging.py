"""A folder appears whole or not at all, whenever the process that writes it is killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewrite
from rewrite.cli.main import main
from rewrite.errors import CheckpointError
from rewrite.sharded import staging
from rewrite.sharded.staging import staged_folder
from tests.sharded.conftest import Make

WRITER = """
import sys, time
from pathlib import Path
from rewrite.sharded.staging import staged_folder
notes = []
with staged_folder(Path(sys.argv[1]), notes) as stage:
    print("begun", flush=True)
    for index in range(40):
        (stage / f"{index}").write_bytes(b"x" * 4096)
        time.sleep(0.002)
print(notes)
"""


def test_it_appears_when_the_block_ends(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", []) as stage:
        (stage / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), staged_folder(tmp_path / "out", []):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(CheckpointError, match="already exists"),
        staged_folder(tmp_path / "out", []),
    ):
        pass


def test_two_writers_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PATIENCE", 0.0)
    with (
        staged_folder(tmp_path / "out", []),
        pytest.raises(CheckpointError, match="another process"),
        staged_folder(tmp_path / "out", []),
    ):
        pass


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_leaves_it_absent_or_whole_and_the_next_run_begins_anew(
    tmp_path: Path, seed: int
) -> None:
    kill_once(tmp_path / "out", random.Random(seed))


@pytest.mark.slow
def test_a_hundred_kills_leave_it_absent_or_whole(tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(100):
        kill_once(tmp_path / f"out{number}", chance)


def kill_once(target: Path, chance: random.Random) -> None:
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "begun\n"
        time.sleep(chance.uniform(0, 0.15))
        running.send_signal(signal.SIGKILL)
    assert not target.exists() or len(list(target.iterdir())) == 40
    # The process that watches over the partial folder takes it away.
    partial, deadline = target.parent / f".{target.name}.partial", time.monotonic() + 20
    while partial.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not partial.exists()
    if target.exists():
        return
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "begun anew: no earlier run" in again.stdout and len(list(target.iterdir())) == 40
    assert not partial.exists()


def test_a_folder_that_was_left_all_the_same_is_begun_anew(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "whole").mkdir(parents=True)
    (left / "whole" / "half").write_text("x")
    notes: list[str] = []
    with staged_folder(tmp_path / "out", notes) as stage:
        (stage / "a").write_text("a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert notes == ["an earlier run was cut off: begun anew"] and not left.exists()


HELD = """
import fcntl, shutil, sys, time
from pathlib import Path
left = Path(sys.argv[1])
with (left / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.readline()
    shutil.rmtree(left)
"""


def test_a_run_waits_for_what_takes_away_the_folder_of_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".out.partial"
    (left / "whole").mkdir(parents=True)
    (left / "whole" / "half").write_text("x")
    command = [sys.executable, "-c", HELD, str(left)]
    notes: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as remover:
        assert remover.stdout is not None and remover.stdout.readline() == "locked\n"

        def let_go(seconds: float) -> None:
            if remover.poll() is None:
                remover.communicate("now\n")

        monkeypatch.setattr(staging.time, "sleep", let_go)
        with staged_folder(tmp_path / "out", notes) as stage:
            (stage / "a").write_text("a")
    assert notes == ["an earlier run was cut off: begun anew"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


CONVERT = """
import sys
from rewrite.cli.main import main
from rewrite.sharded.writer import FolderWriter
real, written = FolderWriter.write, []

def write(writer, name, content, begin):
    real(writer, name, content, begin)
    written.append(name)
    if len(written) == 7:
        print("in the middle", flush=True)
        sys.stdin.readline()

FolderWriter.write = write
sys.exit(main(["convert", "--fold", "--no-verify", *sys.argv[1:]]))
"""


@pytest.mark.filterwarnings("ignore")
def test_a_conversion_killed_in_the_middle_leaves_nothing_and_the_next_says_that_it_begins_anew(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make()
    out = source.with_name("out")
    command = [sys.executable, "-c", CONVERT, str(source), "-o", str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "in the middle\n"
        assert (out.parent / ".out.partial" / "whole").is_dir() and not out.exists()
        running.kill()
    assert not out.exists()
    capsys.readouterr()
    assert main(["convert", "--fold", "--no-verify", str(source), "-o", str(out)]) == 0
    assert "begun anew" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == [source.name, "out"]
    whole = source.with_name("whole")
    rewrite.convert_checkpoint(source, whole, "fold", verify=False)
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
