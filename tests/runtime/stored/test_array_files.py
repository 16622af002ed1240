"""Arrays of numpy files open as numpy writes them, and only if they are as long as they say."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch

from rewrite.errors import VerificationError
from rewrite.runtime.stored.array_files import check_arrays, read_arrays
from rewrite.runtime.stored.input_files import load_inputs

ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4, 5))),
    np.float32(3.0) * np.ones(()),
    np.zeros((0, 3), dtype=np.float16),
    np.array([True, False]),
    np.arange(4, dtype=">f4"),
    np.array([1 + 2j]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
@pytest.mark.parametrize("form", ["npy", "npz", "packed"])
def test_what_numpy_writes_opens(tmp_path, array, form) -> None:
    path = tmp_path / f"a.{'npy' if form == 'npy' else 'npz'}"
    if form == "npy":
        np.save(path, array)
    else:
        (np.savez if form == "npz" else np.savez_compressed)(path, x=array)
    check_arrays(path)
    (found,) = read_arrays(path).values()
    assert found.shape == array.shape
    np.testing.assert_array_equal(found.numpy(), array)
    found += found  # the memory is its own, and may be written


def npy(shape: str, dtype: str = "<f4", data: bytes = b"\0" * 16) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


BAD = {
    "huge": npy("(100000000000,)"),
    "short": npy("(5,)"),
    "long": npy("(3,)"),
    "negative": npy("(-1, -4)"),
    "no tuple": npy("__import__('os')"),
    "objects": npy("(2,)", "|O"),
    "text": npy("(4,)", "<U1"),
    "none": b"no array at all",
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_what_is_no_array_of_numbers_is_one_line(tmp_path, name, suffix) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(BAD[name])
    if suffix == "npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", BAD[name])
    with pytest.raises(VerificationError) as error:
        load_inputs(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises((ValueError, SyntaxError)) as same:
        check_arrays(path)
    assert str(same.value)[:40] in str(error.value)


def test_an_archive_that_expands_to_more_than_arrays_do_is_refused(tmp_path) -> None:
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="would expand"):
        read_arrays(path)


def test_two_arrays_of_one_name_are_refused(tmp_path) -> None:
    path, data = tmp_path / "a.npz", io.BytesIO()
    np.save(data, np.ones(3))
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x.npy", "X.npy"):
            archive.writestr(name, data.getvalue())
    with pytest.raises(ValueError, match="one name"):
        read_arrays(path)
    np.savez(tmp_path / "b.npz", x=np.ones(3), y=np.ones(3))
    assert torch.equal(read_arrays(tmp_path / "b.npz")["y"], torch.ones(3, dtype=torch.float64))
