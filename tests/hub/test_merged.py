"""Tensors that lie in a folder part by part: put together, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rewrite.files.safetensors_header import Entry
from rewrite.hub.merged import Merged

PARTS = {f"{kind}.{n}": torch.randn(rows, 3) for kind, rows in (("a", 2), ("b", 4)) for n in (0, 1)}
MERGED = Merged((("a.0", "a.1"), ("b.0", "b.1")))


def entries(tensors: dict[str, Tensor]) -> Callable[[str], Entry]:
    return lambda name: Entry("F32", tuple(tensors[name].shape), 0, 4 * tensors[name].numel())


def test_experts_are_stacked_and_their_layers_put_one_behind_the_other() -> None:
    whole = MERGED.read(PARTS.__getitem__)
    assert torch.equal(whole[1], torch.cat([PARTS["a.1"], PARTS["b.1"]]))
    entry = MERGED.entry(entries(PARTS))
    assert entry.shape == tuple(whole.shape) == (2, 6, 3)
    assert entry.size == 4 * whole.numel()


def test_split_is_the_inverse_of_read() -> None:
    parts = dict(MERGED.split(MERGED.read(PARTS.__getitem__), entries(PARTS)))
    assert parts.keys() == PARTS.keys()
    assert all(torch.equal(parts[name], PARTS[name]) for name in PARTS)


def test_parts_of_other_shapes_do_not_fit() -> None:
    assert MERGED.fits(entries(PARTS))
    assert not MERGED.fits(entries({**PARTS, "a.1": torch.randn(3, 3)}))
    assert not MERGED.fits(entries({**PARTS, "b.0": torch.randn(4, 2), "b.1": torch.randn(4, 2)}))
    assert not Merged((("a.0", "a.1"), ("b.0",))).fits(entries(PARTS))
    assert not Merged(MERGED.groups, axis=3).fits(entries(PARTS))
