"""Images that would take all memory or start a program are left out and named; others are read."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from torch import nn

from rewrite.calibration.data import ImageFolder, open_calibration
from rewrite.errors import OptionError


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """Return a PNG that says it has so many grey pixels, and holds a few of them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(
        b"IDAT", zlib.compress(bytes((width + 1) * height) if width * height < 999 else bytes(9))
    )
    return b"\x89PNG\r\n\x1a\n" + head + extra + pixels + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("P", (2, 2)).save(data, "GIF")
    content = bytearray(data.getvalue())
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def bmp(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "BMP")
    content = bytearray(data.getvalue())
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def as_format(name: str) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, name)
    return data.getvalue()


BOMBS = {
    "square": (png(60_000, 60_000), "3600000000 pixels"),
    "nine thousand": (png(9_000, 9_000), "9000 x 9000 pixels are too many"),
    "a line": (png(1, 20_000_000), "1 x 20000000 pixels are too many"),
    "an animation": (gif(65_535, 65_535), "4294836225 pixels"),
    "a bitmap": (bmp(50_000, 50_000), "2500000000 pixels"),
    "text": (png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))), "too large"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    "icon": (as_format("ICO"), "cannot identify"),
    "raster": (as_format("SGI"), "cannot identify"),
    "sequence": (as_format("PCX"), "cannot identify"),
    "cut": (as_format("JPEG")[:-200], "runcated"),
}


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_left_out_and_named_and_the_rest_is_read(
    tmp_path: Path, model: nn.Module, name: str
) -> None:
    content, words = BOMBS[name]
    (tmp_path / "bomb.png").write_bytes(content)
    (tmp_path / "good.png").write_bytes(as_format("PNG"))
    source = open_calibration(str(tmp_path), model, size=8)
    assert isinstance(source, ImageFolder)
    assert [len(batch) for batch in source] == [1]
    (said,) = source.left_out
    assert said.startswith("bomb.png: ")
    assert words in said
    (tmp_path / "good.png").unlink()
    with pytest.raises(OptionError, match="none of 1 is readable"):
        list(open_calibration(str(tmp_path), model, size=8))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_listed_formats_are_read_whatever_they_are_called(
    tmp_path: Path, model: nn.Module, name: str
) -> None:
    if name == "WEBP" and not features.check("webp"):
        pytest.skip("this pillow has no WEBP")
    (tmp_path / "image.png").write_bytes(as_format(name))
    (batch,) = open_calibration(str(tmp_path), model, size=8)
    assert batch.shape == (1, 3, 8, 8)
    assert batch.std() > 0.1


def test_a_large_photo_is_read(tmp_path: Path, model: nn.Module) -> None:
    """Of 48 million pixels, as telephones make them."""
    Image.new("L", (8000, 6000), 200).save(tmp_path / "photo.png")
    (batch,) = open_calibration(str(tmp_path), model, size=8, mean=(0.0,), std=(1.0,))
    np.testing.assert_allclose(batch.numpy(), 200 / 255, rtol=1e-6)
