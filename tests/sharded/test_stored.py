"""Stored tensors against what they were before they were rounded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.safetensors_file import open_safetensors
from rewrite.sharded.stored import StoredCheck
from rewrite.weights.tensor_recipe import Computed

SHAPE = (300, 257)  # more than one block
EXACT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def given(tensor: Tensor) -> Tensor:
    return tensor


def check(place: Path, stored: Tensor, kind: type[partial[Tensor]] = partial) -> StoredCheck:
    """Return the check of a folder that holds one tensor, whose exact value is `EXACT`."""
    save_file({"w": stored}, place / "x.safetensors")
    shard = open_safetensors(place / "x.safetensors")
    folder = CheckpointFolder(place, {}, {"x": shard}, {"w": "x"}, None)
    return StoredCheck(folder, {"w": kind(given, EXACT)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("by", ["read", "rest"])
def test_the_nearest_value_passes_and_its_neighbour_does_not(
    dtype: torch.dtype, by: str, tmp_path: Path
) -> None:
    for off in (False, True):
        stored = EXACT.to(dtype, copy=True)
        if off:
            stored[-1, -1] *= 1 + torch.finfo(dtype).eps
        found = check(tmp_path, stored)
        if by == "read":
            read = found.reader("w")
            assert read is not None and torch.equal(read(), EXACT) and torch.equal(read(), EXACT)
            assert len(found.wrong) == off  # once, however often it is read
        found.rest()
        assert found.wrong == ([f"w is not its exact value rounded to {dtype}"] if off else [])


def test_what_a_model_computes_may_be_some_roundings_off(tmp_path: Path) -> None:
    near = EXACT.float() * (1 + 8 * torch.finfo(torch.float32).eps)
    far = near.clone()
    far[-1, -1] *= 1 + 20 * torch.finfo(torch.float32).eps
    nan = near.clone()
    nan[0, 0] = float("nan")
    for stored, wrong in ((near, False), (far, True), (nan, True)):
        found = check(tmp_path, stored, Computed)
        found.rest()
        assert found.wrong == (["w is not what the model computes"] if wrong else [])


def test_another_shape_is_wrong(tmp_path: Path) -> None:
    found = check(tmp_path, EXACT[:-1].contiguous())
    found.rest()
    assert len(found.wrong) == 1


def test_an_old_tensor_is_not_compared(tmp_path: Path) -> None:
    assert check(tmp_path, EXACT).reader("of the old folder") is None
