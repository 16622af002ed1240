"""Modules are judged by their states: names, circles, depth, calls that take memory."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import nn

from benchmarks.allowed_classes import module_methods
from rewrite.checkpoint.archive import Archive
from rewrite.checkpoint.vetting.names import values
from rewrite.checkpoint.vetting.programs import archived_program
from rewrite.checkpoint.vetting.tree import check_nodes
from rewrite.errors import CheckpointError


def nodes_of(value):
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return [event.node for event in archived_program(Archive(data)).events]


def test_a_shared_module_is_no_circle():
    shared = nn.Linear(2, 2)
    check_nodes(nodes_of(nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))))


def test_a_circle_and_its_place():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0]._modules["up"] = model
    with pytest.raises(CheckpointError, match="contains itself"):
        check_nodes(nodes_of(model))


def test_a_name_is_refused_with_its_place():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0]._modules["a.b"] = nn.ReLU()
    with pytest.raises(CheckpointError, match=r"^0: has the name 'a.b' among its modules"):
        check_nodes(nodes_of(model))


def test_sets_are_made_of_lists():
    check_nodes(nodes_of({1, 2}))
    check_nodes(nodes_of(frozenset({1})))
    check_nodes(nodes_of(torch.tanh))
    with pytest.raises(CheckpointError, match="getattr"):
        check_nodes(nodes_of(torch.from_file))


def test_the_name_of_a_method_is_taken_and_another_is_free():
    model = nn.Sequential(nn.ReLU())
    vars(model[0])["scale"] = 3
    check_nodes(nodes_of(model))
    vars(model[0])["forward"] = 3
    with pytest.raises(CheckpointError, match="0: has an attribute 'forward' in"):
        check_nodes(nodes_of(model))


def test_every_method_of_a_module_is_known_before_torch_is():
    methods = module_methods()
    assert values("methods") == methods
    assert not methods & vars(nn.LSTM(2, 2)).keys()


def test_a_partial_is_of_a_name():
    model = nn.Sequential(nn.ReLU())
    model.kind = functools.partial(nn.LayerNorm, eps=1e-3)
    check_nodes(nodes_of(model))
    model.kind = functools.partial(torch.relu)
    with pytest.raises(CheckpointError, match="partial of something that is no allowed name"):
        check_nodes(nodes_of(model))
