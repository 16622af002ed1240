"""How much memory is free and used, as the system tells it."""

from __future__ import annotations

import numpy as np

from rewrite.memory import free_memory, used_memory


def test_a_process_uses_what_it_holds() -> None:
    before = used_memory()
    held = np.ones(16 << 20, np.uint8)
    assert used_memory() - before > 8 << 20
    assert held[0]


def test_a_computer_has_memory_and_no_petabytes() -> None:
    assert 1 << 20 < free_memory() < 1 << 50
