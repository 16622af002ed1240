"""Unpack the photos of GCompris, to fit to photos of many things.

    apt-get download gcompris-qt-data && dpkg-deb -x gcompris-qt-data_*.deb gcompris
    python -m benchmarks.photos gcompris/usr/share/gcompris-qt/rcc photos

GCompris keeps its images, WebP and JPEG, uncompressed in Qt resource files. What is written are the
photos among them: of windmills, tools, fish, monuments, animals, instruments. They have their own
free licences, listed in the Debian package.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = ("categorization", "clickgame", "explore_farm_animals", "explore_monuments",
         "explore_world_animals", "explore_world_music")  # fmt: skip
_LEAST_SIDE, _LEAST_COLOURS = 200, 2000


def images(data: bytes) -> Iterator[Any]:
    """Yield the images that lie in a resource file."""
    from PIL import Image, UnidentifiedImageError

    for found in re.finditer(rb"RIFF....WEBP|\xff\xd8\xff", data, re.DOTALL):
        try:
            image = Image.open(io.BytesIO(data[found.start() :]))
            image.load()
        except (UnidentifiedImageError, OSError):
            continue  # The three bytes that open a JPEG occur in other data too.
        yield image


def is_photo(image: Any) -> bool:
    """Return whether an image is large, opaque and of many colours: a drawing is not."""
    if image.mode != "RGB" or min(image.size) < _LEAST_SIDE:
        return False
    small = image.resize((64, 64)).tobytes()
    return len({small[i : i + 3] for i in range(0, len(small), 3)}) > _LEAST_COLOURS


def main() -> None:
    """Write each photo as a PNG file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("resources", type=Path, help="the folder with GCompris' .rcc files")
    parser.add_argument("folder", type=Path, help="where to write the photos")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name in FILES:
        photos = filter(is_photo, images((options.resources / f"{name}.rcc").read_bytes()))
        for number, photo in enumerate(photos):
            photo.save(options.folder / f"{name}_{number:03}.png")
            count += 1
    print(f"{count} photos in {options.folder}")


if __name__ == "__main__":
    main()
