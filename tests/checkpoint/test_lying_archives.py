"""Archives that lie about sizes, places, names and checksums; and files of two kinds."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks._hostile import payload, saved
from rewrite.checkpoint.load import load
from rewrite.errors import CheckpointError

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture
def good() -> bytes:
    """Return a checkpoint with short members, as another tool zips it."""
    with zipfile.ZipFile(io.BytesIO(saved(linear()))) as old:
        members = {name: old.read(name) for name in old.namelist()}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return data.getvalue()


def entry(data: bytes, ending: str) -> int:
    """Return where the directory's entry of a member begins."""
    at = -1
    while (at := data.find(CENTRAL, at + 1)) >= 0:
        length = struct.unpack_from("<H", data, at + 28)[0]
        if data[at + 46 : at + 46 + length].endswith(ending.encode()):
            return at
    raise AssertionError(ending)


def changed(data: bytes, at: int, form: str, *values: int) -> bytes:
    content = bytearray(data)
    struct.pack_into(form, content, at, *values)
    return bytes(content)


def with_zip64(data: bytes, ending: str, size: int, packed: int) -> bytes:
    """Return the archive with a member whose sizes stand in a zip64 field of the directory."""
    at = entry(data, ending)
    name, extra = struct.unpack_from("<HH", data, at + 28)
    field = struct.pack("<HHQQ", 1, 16, size, packed)
    end = data.rindex(END)
    content = bytearray(data)
    struct.pack_into("<II", content, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", content, at + 30, extra + len(field))
    length = struct.unpack_from("<I", data, end + 12)[0]
    struct.pack_into("<I", content, end + 12, length + len(field))
    content[at + 46 + name : at + 46 + name] = field
    return bytes(content)


def refused(tmp_path: Path, data: bytes, *words: str) -> None:
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in words), str(caught.value)


def opens(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(data)
    assert torch.equal(load(tmp_path / "m.pt").weight, linear().weight)


def test_a_member_that_says_it_is_a_terabyte(tmp_path, good) -> None:
    size = len(good)
    opens(tmp_path, with_zip64(good, "data/0", 24, 24))
    refused(tmp_path, with_zip64(good, "data/0", 1 << 40, 24), "would expand to 10995")
    refused(tmp_path, with_zip64(good, "data/0", 24, 1 << 40), "share their bytes")
    refused(tmp_path, with_zip64(good, "data.pkl", 1 << 63, size), "would expand", "share")


def test_a_member_that_is_longer_or_shorter_than_it_says(tmp_path, good) -> None:
    at = entry(good, "data/0")
    refused(tmp_path, changed(good, at + 20, "<II", 20, 20), "instead of 24", "damaged")
    refused(tmp_path, changed(good, at + 20, "<II", 28, 28), "damaged")
    refused(tmp_path, changed(good, at + 24, "<I", 28), "truncated", "damaged", "fewer bytes")


def test_members_whose_places_lie(tmp_path, good) -> None:
    at, other = entry(good, "data/0"), entry(good, "data/1")
    (place,) = struct.unpack_from("<I", good, other + 42)
    refused(tmp_path, changed(good, at + 42, "<I", place), "damaged")
    refused(tmp_path, changed(good, at + 42, "<I", 1 << 31), "damaged")
    (directory,) = struct.unpack_from("<I", good, good.rindex(END) + 16)
    refused(tmp_path, changed(good, at + 42, "<I", directory), "damaged")


def test_a_name_that_two_readers_see_differently(tmp_path, good) -> None:
    """The header before the bytes has another name than the directory."""
    at = good.index(b"data/0")
    refused(tmp_path, good[:at] + b"data/7" + good[at + 6 :], "damaged")
    refused(tmp_path, good.replace(b"data/0", b"data\\0"), "has no data/0", "damaged")


def test_data_descriptors_are_read_and_not_believed(tmp_path, good) -> None:
    """A stream that cannot seek leaves the sizes behind the bytes: bit 3 of the flags."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    data = Stream()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(data, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    streamed = data.getvalue()
    assert b"PK\x07\x08" in streamed
    opens(tmp_path, streamed)
    at = streamed.index(linear().weight.detach().numpy().tobytes())
    refused(tmp_path, changed(streamed, at, "<B", streamed[at] ^ 1), "damaged")
    # What the descriptor says is nobody's business: the directory counts.
    opens(tmp_path, changed(streamed, at + 24 + 8, "<II", 1 << 30, 1 << 30))


@pytest.mark.parametrize("bit", [0x1, 0x40])
def test_encrypted_members(tmp_path, good, bit) -> None:
    at = entry(good, "data.pkl")
    (flags,) = struct.unpack_from("<H", good, at + 8)
    refused(tmp_path, changed(good, at + 8, "<H", flags | bit), "encrypted", "damaged", "read")


def test_a_way_of_packing_that_nobody_knows(tmp_path, good) -> None:
    at = entry(good, "data/0")
    refused(tmp_path, changed(good, at + 10, "<H", 99), "damaged", "cannot be read")


def test_a_number_of_members_that_is_none(tmp_path, good) -> None:
    end = good.rindex(END)
    for place, form, value in ((12, "<I", 1 << 31), (16, "<I", 1 << 31), (12, "<I", 3)):
        refused(tmp_path, changed(good, end + place, form, value), "damaged")


# -- files of two kinds ------------------------------------------------------------------------


def test_an_archive_behind_a_pickle_is_one_or_the_other(tmp_path, good) -> None:
    """torch looks at the first bytes, zip readers at the last: what is opened runs nothing."""
    evil = saved(payload("m.pt"), zipped=False)
    refused(tmp_path, evil + good, "posix.system", "os.system", "system")
    assert not list(tmp_path.glob("pwned*"))


def test_a_pickle_behind_an_archive_is_not_seen(tmp_path, good) -> None:
    (tmp_path / "m.pt").write_bytes(good + saved(payload("m.pt"), zipped=False)[:60_000])
    try:
        assert torch.equal(load(tmp_path / "m.pt").weight, linear().weight)
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not list(tmp_path.glob("pwned*"))


def test_two_archives_in_one_file(tmp_path, good) -> None:
    """The last directory counts, and the members before it are no part of the file."""
    evil = saved(payload("m.pt"))
    opens(tmp_path, evil + good)
    refused(tmp_path, good + evil, "posix.system", "os.system", "system")
    assert not list(tmp_path.glob("pwned*"))


def test_an_archive_in_the_comment_of_another(tmp_path, good) -> None:
    evil = saved(payload("m.pt"))[:60_000]
    end = good.rindex(END)
    outer = changed(good, end + 20, "<H", len(evil)) + evil
    refused(tmp_path, outer, "posix.system", "os.system", "system", "damaged")
    assert not list(tmp_path.glob("pwned*"))


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        (".safetensors", "is no safetensors file, or is cut off"),
        (".onnx", "is an ONNX graph"),
        (".pt2", "no part of an exported program|names posix.system"),
        (".gguf", "names posix.system"),
        (".bin", "names posix.system"),
        (".ckpt", "names posix.system"),
    ],
)
def test_a_suffix_opens_no_other_door(tmp_path, suffix, reason) -> None:
    for zipped in (True, False):
        path = tmp_path / f"m{suffix}"
        path.write_bytes(saved(payload("m.pt"), zipped=zipped))
        with pytest.raises(CheckpointError, match=reason):
            load(path)
        assert not list(tmp_path.glob("pwned*"))


GGUF = {
    "counts": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "a text": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"abc",
    "bare": b"GGUF",
}


@pytest.mark.parametrize("content", GGUF)
@pytest.mark.parametrize("suffix", [".gguf", ".pt", ".safetensors"])
def test_gguf_is_refused_whatever_it_says(tmp_path, content, suffix) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(GGUF[content])
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "give the folder of safetensors that it was made from" in str(caught.value)
