"""What is no file is named before anything waits for it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from rewrite.files import named_twice, no_file


def test_what_a_path_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert no_file(tmp_path / "socket") == "is a socket, not a file"
    assert no_file(tmp_path) == "is a folder, not a file"
    assert no_file(tmp_path / "pipe") == no_file(tmp_path / "to_pipe") == "is a pipe, not a file"
    assert no_file("/dev/zero") == "is a device, not a file"
    for name in ("file", "link", "nothing", "x" * 5000, "a\0b"):
        assert no_file(tmp_path / name) == ""


def test_a_key_that_stands_twice_is_named() -> None:
    assert named_twice([("a", 1), ("b", 2), ("a", 3)]) == "a"
    assert named_twice([("a", 1), ("b", 1)]) is None and named_twice([]) is None
