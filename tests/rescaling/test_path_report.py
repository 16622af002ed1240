"""Path norms of the parts of a model."""

from __future__ import annotations

import torch
from torch import nn

import rewrite
from rewrite.rescaling.path_norm import path_norms_by_region


def test_by_region_gives_the_parts_that_have_one() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model = nn.Sequential(stem, head)
    rows = {row.name: row for row in path_norms_by_region(model, (2,), torch.zeros(1, 1, 4, 4))}
    assert rows[""].norms == {} and "layer norm" in rows[""].reason
    assert rows["0"].norms[2] == rewrite.path_norm(stem, 2, torch.zeros(1, 1, 4, 4))
    assert rows.keys() == {"", "0"}
