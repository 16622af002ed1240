"""The functions and methods that a graph in a file may call."""

from __future__ import annotations

import torch
import torch.fx

from rewrite.checkpoint.allowed_functions import METHODS, find_function, readable


def test_readable_attributes_are_data():
    assert all(readable(name) for name in ("shape", "dtype", "device", "ndim", "logits"))
    assert not any(readable(name) for name in ("numpy", "__class__", "format", "_version", "a b"))


def test_methods_only_compute():
    assert {"view", "mean", "flatten", "softmax"} <= METHODS
    assert not METHODS & {"numpy", "apply_", "share_memory_", "set_", "register_hook", "format"}


def test_listed_functions_are_found():
    for name in ("torch.add", "torch.nn.functional.gelu", "_operator.getitem", "math.sqrt"):
        assert callable(find_function(name, ()))
    assert find_function("torch.ops.aten.relu.default", ()) is torch.ops.aten.relu.default
