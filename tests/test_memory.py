"""How much memory is free and used, as the system tells it."""

from __future__ import annotations

import mmap

from rewrite.memory import free_memory, private_memory, used_memory


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
