"""Prefixes that training wrappers add to keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load
from tests.checkpoint.files import LINEAR, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "module.", "ema_model.", "_fsdp_wrapped_module.", "a.b.c."]
)
def test_a_prefix_that_makes_all_keys_fit_is_taken_off_and_said(tmp_path, prefix):
    linear, notes = nn.Linear(2, 2), []
    state = {prefix + key: value for key, value in linear.state_dict().items()}
    beside = {} if prefix[0] == "_" else {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": {**state, **beside}}, tmp_path / "c.pt")
    assert same(load(tmp_path / "c.pt", factory=LINEAR, note=notes.append), linear)
    assert any(prefix.strip(".") in note for note in notes)
