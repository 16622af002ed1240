"""Read the pickle of a checkpoint as inert data: from an archive, or from the format before it.

archive = ROOT/data.pkl + ROOT/data/KEY for each storage
older   = magic, protocol, system, object, keys            five pickles, one after the other
"""

from __future__ import annotations

import io
from typing import IO

from rewrite.checkpoint.archive import Archive
from rewrite.checkpoint.vetting.opcodes import ListOf, Program, parse
from rewrite.errors import CheckpointError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def archived_program(archive: Archive) -> Program:
    """Return the pickle of a zip archive.

    Raises:
        CheckpointError: the archive is no checkpoint, or of another byte order.
    """
    if "byteorder" in archive.names and archive.read("byteorder").strip() != b"little":
        raise CheckpointError("was written on a machine of another byte order")
    if "data.pkl" not in archive.names:
        raise CheckpointError("has no data.pkl: an archive, but no checkpoint")
    return parse(io.BytesIO(archive.read("data.pkl")))


def parse_legacy(stream: IO[bytes]) -> tuple[Program, list[str]]:
    """Return the object of a file of the format before zip, and the keys of its tensors.

    Raises:
        CheckpointError: the file is no checkpoint, or a damaged one.
    """
    if parse(stream).root != _MAGIC or parse(stream).root != _PROTOCOL:
        raise CheckpointError("is no checkpoint, or a damaged one")
    parse(stream)
    program, keys = parse(stream), parse(stream).root
    if not (isinstance(keys, ListOf) and all(isinstance(key, str) for key in keys.items)):
        raise CheckpointError("is no checkpoint, or a damaged one")
    return program, keys.items
