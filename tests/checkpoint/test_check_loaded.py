"""What a model that came out of a file may look like."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tests.checkpoint.files import refused_at_once, with_attribute

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_circles_and_depth(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2))
    module._modules["self"] = module
    torch.save(module, tmp_path / "circle.pt")
    refused_at_once(tmp_path / "circle.pt", "contains itself")
    nested = {}
    nested["model"] = nested
    torch.save(nested, tmp_path / "nested.pt")
    refused_at_once(tmp_path / "nested.pt", "neither a model nor a state dict")
    shared = nn.Linear(2, 2)
    for _ in range(60):
        shared = nn.Sequential(shared, shared)
    torch.save(shared, tmp_path / "paths.pt")
    refused_at_once(tmp_path / "paths.pt", "too deep")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_attribute("modules", functools.partial(nn.Linear, 2)), "in the place of a method"),
        (with_attribute("forward", torch.relu), "in the place of a method"),
        (with_attribute("__call__", torch.relu), "in the place of a method"),
        (with_attribute("options", {nn.Linear: 1}), "as the key of a dict"),
        (with_attribute("_buffers", {"x": nn.ReLU}), "which is none"),
        (with_attribute("_forward_hooks", {0: torch.relu}), "may bring none"),
        (with_attribute("training", 1), "training mode"),
        (with_attribute("act", torch.from_file), "getattr"),
        (with_attribute("act", torch.as_strided), "getattr"),
    ],
)
def test_what_a_module_may_not_have(tmp_path, model, words):
    torch.save(model, tmp_path / "m.pt")
    refused_at_once(tmp_path / "m.pt", words)
