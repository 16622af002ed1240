"""The state dict of a checkpoint is found in inert data."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from rewrite.checkpoint.archive import Archive
from rewrite.checkpoint.vetting.programs import archived_program
from rewrite.checkpoint.vetting.state import describe_root, find_state, is_module, left_out
from rewrite.errors import CheckpointError


def root_of(value):
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return archived_program(Archive(data)).root


def test_where_the_state_dict_is():
    state = nn.Linear(2, 2).state_dict()
    found = find_state(root_of({"epoch": 3, "state_dict": state}))
    assert found is not None and found[0] == "state_dict" and not is_module(found[1])
    assert left_out(root_of({"epoch": 3, "state_dict": state}), "state_dict") == ("epoch (int)",)
    two = root_of({"a": state, "b": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match="a, b"):
        find_state(two)
    assert is_module(find_state(two, "b")[1])


def test_what_holds_none_is_described():
    assert find_state(root_of({"x": 1})) is None
    assert describe_root(root_of({"x": 1})) == "a dict with the keys x"
    assert describe_root(root_of(torch.ones(1))) == "a Tensor"


def test_a_version_beside_the_tensors_does_not_hide_them():
    state = nn.Sequential(nn.Linear(2, 2)).state_dict()
    nested = {"model": {**state, "note": "x"}}
    for value, place in (({**state, "version": 3}, ""), (nested, "model")):
        found = find_state(root_of(value))
        assert found is not None and found[0] == place
    assert left_out(root_of({**state, "version": 3}), "") == ("version (int)",)
    assert left_out(root_of({**nested, "n": 1}), "model") == (
        "n (int)", "note (str)"
    )  # fmt: skip


def test_tensors_of_another_meaning_are_no_state_dict():
    state = nn.Sequential(nn.Linear(2, 2)).state_dict()
    assert find_state(root_of({"best": torch.ones(1), "epoch": 3})) is None
    assert find_state(root_of({"loss.best": torch.ones(1), "epoch": 3, "args": {}})) is None
    found = find_state(root_of({"best.loss": torch.ones(1), "weights": state}))
    assert found is not None and found[0] == "weights"
