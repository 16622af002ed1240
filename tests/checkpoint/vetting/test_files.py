"""What is no checkpoint at all is said by what it looks like."""

from __future__ import annotations

import zipfile

import pytest
import torch

from rewrite.checkpoint.vetting.files import check_file, is_exported
from rewrite.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.pt", b"", "is empty"),
        ("a.pt", b"hello", "text file"),
        ("a.onnx", b"\x08\x01", "ONNX"),
        ("a.pt", b"PK\x03\x04xx", "truncated"),
    ],
)
def test_what_is_none(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        check_file(tmp_path / name)


def test_kinds_of_archives(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    check_file(tmp_path / "a.pt")
    assert not is_exported(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
    assert is_exported(tmp_path / "b.pt")
