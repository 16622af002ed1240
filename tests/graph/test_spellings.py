"""Every spelling of a layer computes what the layer of its name computes; names are plain."""

from __future__ import annotations

import operator
from inspect import isbuiltin

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph

from rewrite.graph.spellings import CONVS, LINEARS, NORMS, is_getitem, is_plain, plain_name


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (F.relu_, "relu"), ("add_", "add"), ("__add__", "__add__"), (torch.mul, "mul"),
        (torch.ops.aten.view.dtype, "view"), (torch.ops.aten.relu_.default, "relu"),
    ],
)  # fmt: skip
def test_a_name_is_that_of_the_operation(target: object, name: str) -> None:
    assert plain_name(target) == name


@pytest.mark.parametrize("target", CONVS, ids=lambda t: t.__name__ if isbuiltin(t) else str(t))
def test_a_convolution_has_the_arguments_that_the_table_names(target: object) -> None:
    dims, transposed, names = CONVS[target]
    x = torch.randn(2, 3, *(6,) * dims, dtype=torch.float64)
    weight = torch.randn(3, 3, *(2,) * dims, dtype=torch.float64)
    own = {"stride": (2,) * dims, "padding": (1,) * dims, "dilation": (1,) * dims}
    held = {"input": x, "weight": weight, "bias": torch.randn(3, dtype=torch.float64), "groups": 1,
            "output_padding": (0,) * dims, **own}  # fmt: skip
    if "padding" in str(target).rpartition(".")[2]:
        held |= {"padding": "valid", "stride": (1,) * dims}
    layer = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
    wanted = layer(**{k: v for k, v in held.items() if k in names})
    assert torch.equal(target(*(held[name] for name in names)), wanted)  # type: ignore[operator]


def test_linear_is_linear() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    assert all(torch.equal(target(x, w), x @ w.T) for target in LINEARS)


def test_norms_are_of_every_kind() -> None:
    assert {kind for kind, _ in NORMS.values()} == {"batch", "group", "layer", "instance", "rms"}


class Own(nn.ReLU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -input


def test_a_layer_with_a_forward_of_its_own_is_not_plain() -> None:
    assert is_plain(nn.ReLU()) and not is_plain(Own())
    assert is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


def test_indexing_is_told_from_a_call() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    assert is_getitem(graph.call_function(operator.getitem, (x, 0)))
    assert not is_getitem(graph.call_function(torch.neg, (x,)))
