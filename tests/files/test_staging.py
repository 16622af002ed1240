"""A file is written completely or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from rewrite.errors import CheckpointError
from rewrite.files import atomic_path, check_writable, write_bytes


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_bytes_and_text(tmp_path):
    assert write_bytes(tmp_path / "a.json", "γ").read_text() == "γ"
    assert write_bytes(tmp_path / "b.bin", b"\x00").read_bytes() == b"\x00"
    assert leftovers(tmp_path) == ["a.json", "b.bin"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = write_bytes(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == ["a"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    target = write_bytes(tmp_path / "a", "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_does_not_overwrite_unless_allowed(tmp_path):
    target = write_bytes(tmp_path / "a", "old")
    with pytest.raises(CheckpointError, match=r"already exists.*--force"):
        write_bytes(target, "new", overwrite=False)
    assert target.read_text() == "old"
    write_bytes(target, "new", overwrite=True)
    assert target.read_text() == "new"


def test_does_not_overwrite_what_appears_meanwhile(tmp_path):
    target = tmp_path / "a"
    with (
        pytest.raises(CheckpointError, match="already exists"),
        atomic_path(target, overwrite=False) as temporary,
    ):
        temporary.write_text("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs"
    assert leftovers(tmp_path) == ["a"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        check_writable(tmp_path / "nowhere" / "a")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        check_writable(tmp_path)


def test_permission_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="no permission"):
        check_writable(tmp_path / "a")
    monkeypatch.undo()
    assert check_writable(tmp_path / "a") == tmp_path / "a"


def test_a_link_stays_a_link(tmp_path):
    write_bytes(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_bytes(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_the_mode_is_that_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_bytes(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("code", "words"), [("ENOSPC", "disk is full"), ("EROFS", "read-only")])
def test_what_the_system_says_becomes_one_line(tmp_path, code, words):
    import errno

    with pytest.raises(CheckpointError, match=words), atomic_path(tmp_path / "a"):
        raise OSError(getattr(errno, code), "system text")
    assert leftovers(tmp_path) == []


def test_a_full_disk_in_a_real_process(tmp_path):
    """A process that may write 4096 bytes a file saves a larger model."""
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from torch import nn
        from rewrite.checkpoint.load import save
        from rewrite.errors import CheckpointError
        model = nn.Linear(100, 100)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        try:
            save(model, sys.argv[1])
        except CheckpointError as error:
            sys.exit(str(error))
        """
    )
    target = tmp_path / "m.pt"

    def run(limit):
        command = [sys.executable, "-c", program, str(target), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    small = run(4096)
    assert small.returncode == 1, small.stderr
    assert len(small.stderr.strip().splitlines()) == 1, small.stderr
    assert str(target) in small.stderr
    assert leftovers(tmp_path) == []
    assert run(1 << 20).returncode == 0
    assert leftovers(tmp_path) == ["m.pt"]


def test_files_of_one_command_get_their_names_together_or_not_at_all(tmp_path):
    from rewrite import files

    old = write_bytes(tmp_path / "a", "old")
    with files.publication() as pending:
        write_bytes(old, "new")
        write_bytes(tmp_path / "b", "new")
        assert leftovers(tmp_path) == ["a"]
        assert old.read_text() == "old"
        assert pending.publish() == (tmp_path / "a", tmp_path / "b")
    assert old.read_text() == (tmp_path / "b").read_text() == "new"
    with files.publication():
        write_bytes(old, "newer")
    assert old.read_text() == "new"


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "dangling", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    place = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/null")
    elif kind == "pipe":  # as /dev/stdout is, of a command in a pipe
        place.symlink_to(f"/proc/self/fd/{os.pipe()[1]}")
    else:
        place.symlink_to(place if kind == "loop" else tmp_path / "no" / "where")
    with pytest.raises(CheckpointError, match=str(place)):
        check_writable(place)
    with pytest.raises(CheckpointError, match=str(place)):
        write_bytes(place, "x")
    assert leftovers(tmp_path) == [kind]


def test_a_killed_process_leaves_nothing(tmp_path):
    program = (
        "import os, signal, sys\nfrom rewrite.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as place:\n"
        "    place.write_bytes(bytes(1000))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert run.returncode == -9
    assert leftovers(tmp_path) == []


def test_without_files_that_have_no_name_a_hidden_one_is_used(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")  # as on macOS
    with atomic_path(tmp_path / "a.txt") as path:
        assert path.parent == tmp_path and path.name.startswith(".a.txt.")
        path.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new" and leftovers(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("where", "name"), [(os, "O_DIRECTORY"), (os, "fchmod"), (signal, "pthread_sigmask")]
)
def test_a_system_that_cannot_publish_says_so_before_anything_is_written(
    tmp_path, monkeypatch, where, name
):
    monkeypatch.delattr(where, name)  # as on Windows
    with pytest.raises(CheckpointError, match=rf"a\.txt: files are written .*\.{name}"):
        write_bytes(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["é" * 125, "a" * 255, "x\udcff" + "é" * 120, "two\nlines"])
def test_a_name_may_have_all_the_bytes_that_a_name_has(tmp_path, name):
    from rewrite import files

    with files.publication() as pending:
        write_bytes(tmp_path / name, "new")
        write_bytes(tmp_path / "b", "new")
        pending.publish()
    write_bytes(tmp_path / name, "newer")
    assert leftovers(tmp_path) == sorted(["b", name])
    assert (tmp_path / name).read_text() == "newer"


def test_a_journal_is_no_target(tmp_path):
    with pytest.raises(CheckpointError, match="unfinished work"):
        check_writable(tmp_path / ".rewrite-prepared")


def test_one_name_is_not_given_twice(tmp_path):
    from contextlib import ExitStack

    from rewrite import files

    (tmp_path / "made").mkdir()
    closed = ExitStack()
    closed.callback((tmp_path / "made").rmdir)
    with files.publication() as pending:
        write_bytes(tmp_path / "a", "one")
        with pytest.raises(CheckpointError, match="written twice"):
            write_bytes(tmp_path / "a", "two")
        with pytest.raises(CheckpointError, match="written twice"):
            files.publish_folder(tmp_path / "made", tmp_path / "a", closed)
        pending.publish()
    assert leftovers(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "one"
