"""A link of a chain of maps is made of the tensors of whatever checkpoint it is run on."""

from __future__ import annotations

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.fold.links import NEGATIVE, Link

STATE = {
    name: torch.rand(3, dtype=torch.float64) + 0.5 for name in ("mean", "var", "weight", "bias")
}
NORM = Link({"is": "norm", "eps": 1e-3, **{name: name for name in STATE}})


def test_a_norm_is_its_affine_map_in_eval_mode() -> None:
    affine = NORM.value(STATE.__getitem__)
    x = torch.randn(5, 3, dtype=torch.float64)
    held = (STATE[name] for name in ("mean", "var", "weight", "bias"))
    wanted = torch.nn.functional.batch_norm(x, *held, eps=1e-3)
    assert torch.allclose(affine.scale * x + affine.shift, wanted, rtol=1e-13, atol=1e-13)
    other = NORM.value({**STATE, "var": STATE["var"] + 1}.__getitem__)
    assert (other.scale * x + other.shift - wanted).abs().max() > 1e-3


def test_it_says_what_it_reads() -> None:
    assert NORM.reads() == set(STATE)
    assert Link({**NORM.data, "bias": None}).reads() == set(STATE) - {"bias"}
    assert NEGATIVE.reads() == set()


def test_what_only_the_model_can_compute_is_refused_elsewhere() -> None:
    link = Link({"is": "other", "target": "block.scale", "reason": "is computed anew"})
    with pytest.raises(CheckpointError, match=r"block\.scale: is computed anew; convert the model"):
        link.value(STATE.__getitem__)
