"""This process as one of several that `torchrun` started.

    torchrun --nproc-per-node 4 -m rewrite convert …

Every process computes the same result, each from its share of the data; the first one alone prints
and writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, distributed


def rank_and_world() -> tuple[int, int]:
    """Return which of how many processes this is."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def all_gather(items: Sequence[str]) -> tuple[str, ...]:
    """Return the items of all ranks."""
    _, world = rank_and_world()
    if world == 1:
        return tuple(items)
    gathered: list[Sequence[str]] = [()] * world
    distributed.all_gather_object(gathered, list(items))
    return tuple(item for part in gathered for item in part)


def all_reduce(tensor: Tensor) -> None:
    """Add `tensor` over all ranks, in place; do nothing in a single process."""
    if rank_and_world()[1] == 1:
        return
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    moved = tensor.to(device)
    distributed.all_reduce(moved)
    tensor.copy_(moved)


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group() -> Iterator[int]:
    """Join the processes that the environment names, if it names any; yield this one's rank."""
    if any(name not in os.environ for name in _VARIABLES):
        yield 0
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()
