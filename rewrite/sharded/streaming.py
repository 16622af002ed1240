"""A tensor multiplied on its way from file to file, chunk by chunk, by the threads that torch has.

    read a chunk -> multiply -> check that it is finite -> write it to each place

A chunk and its product lie in buffers that a thread fills again and again, so no memory is taken
for a tensor, and every byte is read and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rewrite.hub.safetensors_file import DTYPES, SafetensorsFile, bytes_of
from rewrite.weights.scaling import Range, Scaling, blocks

CHUNK = 1 << 19
"""Elements that are read and written at a time."""

Write = Callable[[memoryview, int], None]
"""Writes bytes at an offset in a tensor of the new folder."""


def scale_tensor(
    source: SafetensorsFile,
    name: str,
    writes: Sequence[Write],
    scaling: Scaling,
    check: Callable[[Tensor], None],
) -> None:
    """Write the product of a tensor, in its own type.

    Args:
        source: the file that holds it.
        name: its name there.
        writes: one for each place that it goes to.
        scaling: what multiplies it.
        check: is given each block of the product, and raises where that may not be.

    Raises:
        CheckpointError: the file cannot be read, or `check` raises it.
        OSError: a place cannot be written.
    """
    entry = source.entries[name]
    dtype = DTYPES[entry.dtype]
    chunks = list(blocks(entry.shape, CHUNK))
    starts = [0]
    for at in chunks:
        starts.append(starts[-1] + dtype.itemsize * _size(at))
    narrow = scaling.between(dtype, dtype)

    def work(first: int) -> None:
        buffers = torch.empty(2, min(CHUNK, max(map(_size, chunks), default=0)), dtype=dtype)
        with source.open() as stream:
            for number in range(first, len(chunks), count):
                at, start = chunks[number], starts[number]
                old, new = buffers[:, : _size(at)].reshape(2, *(length for _, length in at))
                source.fill(stream, name, start, old)
                narrow.fill(new, old, at, check)
                for write in writes:
                    write(bytes_of(new), start)

    count = max(1, min(torch.get_num_threads(), len(chunks)))
    if count == 1:
        work(0)
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))


def _size(at: Sequence[Range]) -> int:
    size = 1
    for _, length in at:
        size *= length
    return size
