"""Arrays of numpy files (.npy, .npz), each as long as its header says before memory is taken.

    .npy = magic, header (dtype, shape, order), product(shape) * itemsize bytes
    .npz = a zip archive of those

An array of objects is a pickle, and refused; so are two members of one name, and an archive that
would expand to far more than a file of arrays does.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from rewrite.files import no_file

if TYPE_CHECKING:
    from torch import Tensor

_EXPANSION, _SPARE = 100, 256 << 20

_Form = tuple[tuple[int, ...], bool, Any]
"""Shape, whether the first axis is the fastest, and dtype."""

T = TypeVar("T")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a .npy file (under "") or of an .npz file, by name.

    Raises:
        OSError: the system does not open the file.
        ValueError: it is damaged, or holds something else than plain arrays.
    """
    return _each(path, _read)


def check_arrays(path: Path) -> None:
    """Raise what `read_arrays` does of a file of other things; nothing but headers is read."""
    _each(path, _header)


def _each(path: Path, read: Callable[[IO[bytes], int], T]) -> dict[str, T]:
    """Return what `read` makes of each array of a file, by name."""
    if wrong := no_file(path):
        raise ValueError(wrong)
    with path.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if path.suffix.lower() == ".npy":
            return {"": read(stream, size)}
        try:
            with zipfile.ZipFile(stream) as archive:
                infos = archive.infolist()
                _check_members(infos, size)
                found = {}
                for info in infos:
                    with archive.open(info) as member:
                        found[info.filename.removesuffix(".npy")] = read(member, info.file_size)
                return found
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"is a damaged archive ({error})") from error
        except NotImplementedError as error:
            raise ValueError(f"is packed in a way that is not read ({error})") from error


def _check_members(infos: list[zipfile.ZipInfo], size: int) -> None:
    names = [info.filename.casefold() for info in infos]
    if len(set(names)) < len(names):
        raise ValueError("holds two arrays of one name")
    total = sum(info.file_size for info in infos)
    if sum(info.compress_size for info in infos) > size or total > _EXPANSION * size + _SPARE:
        raise ValueError(f"has {size} bytes and would expand to {total}")


def _header(stream: IO[bytes], size: int) -> _Form:
    """Return the form of an array, whose bytes have to be there as its header says."""
    version = np.lib.format.read_magic(stream)
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"is an array of format {version}")
    try:
        shape, fortran, dtype = readers[version](stream)
    except (tokenize.TokenError, SyntaxError, RecursionError) as error:
        raise ValueError("is an array with a damaged header") from error
    if dtype.hasobject or dtype.kind not in "biufc":
        raise ValueError(f"holds {dtype}, where numbers are needed")
    length = math.prod(shape) * dtype.itemsize
    held = size - stream.tell()
    if min(shape, default=0) < 0 or length != held:
        raise ValueError(f"has {held} bytes for an array of {length}")
    return shape, fortran, dtype


def _read(stream: IO[bytes], size: int) -> Tensor:
    """Return one array, whose bytes have to be there before memory for them is taken."""
    import torch

    shape, fortran, dtype = _header(stream, size)
    length = math.prod(shape) * dtype.itemsize
    data = bytearray(stream.read(length))
    if len(data) != length:
        raise ValueError("is cut off")
    order: Any = "F" if fortran else "C"
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    native = array.astype(dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native).reshape(shape))
