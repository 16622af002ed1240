"""How much memory is free and used, as the system tells it."""

from __future__ import annotations

import gc
import mmap

import pytest

from rewrite.memory import free_memory, private_memory, rare_collection, used_memory


def test_a_process_uses_what_it_holds() -> None:
    before = used_memory()
    with mmap.mmap(-1, 64 << 20) as held:  # pages of its own, where an array may get old ones
        held.write(b"1" * (64 << 20))
        assert used_memory() - before > 32 << 20


def test_a_computer_has_memory_and_no_petabytes() -> None:
    assert 1 << 20 < free_memory() < 1 << 50


def test_private_memory_grows_by_what_is_reserved() -> None:
    before = private_memory()
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        assert before == 0 or private_memory() - before >= 64 << 20


@pytest.mark.parametrize("before", [(700, 10, 10), (0, 10, 10), (1_000_000, 5, 200)])
def test_garbage_is_collected_rarely_and_then_as_before(before: tuple[int, int, int]) -> None:
    own = gc.get_threshold()
    try:
        gc.set_threshold(*before)
        with pytest.raises(ValueError), rare_collection():
            inside = gc.get_threshold()
            raise ValueError
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*own)
    assert inside[0] == (max(before[0], 100_000) if before[0] else 0)
    assert all(map(int.__ge__, inside, before))
