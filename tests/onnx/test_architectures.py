"""Negative controls on exported architectures: one thing wrong in the middle, found at its node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import models
from rewrite.equivalence.verification import Level
from rewrite.onnx.export import export
from rewrite.onnx.values import scope_of
from rewrite.onnx.verify import verify_onnx

SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Exported:
    """A model, its inputs, and the right graph of it."""

    model: nn.Module
    inputs: tuple[torch.Tensor]
    path: Path


def build(name: str) -> nn.Module:
    package, _, architecture = name.partition(":")
    torch.manual_seed(0)
    if package == "timm":
        model = pytest.importorskip("timm").create_model(architecture, num_classes=10)
    else:
        model = getattr(pytest.importorskip("torchvision").models, architecture)(num_classes=10)
    for key, parameter in model.named_parameters():
        # A block that starts as nothing (a scale of 0 or 1e-6) hides every fault in it.
        scale = key.endswith(("gamma", "weight")) and parameter.ndim == 1
        if scale and bool((parameter.abs() < 1e-3).all()):
            nn.init.uniform_(parameter, 0.5, 1)
    return models.randomize_norms_(model).eval()


@pytest.fixture(
    scope="module",
    params=[
        ("torchvision:shufflenet_v2_x0_5", 64),
        ("timm:convnext_atto", 64),
        pytest.param(("timm:levit_128s", 224), marks=SLOW),
        pytest.param(("timm:mobilenetv3_small_050", 64), marks=SLOW),
    ],
    ids=lambda param: param[0].partition(":")[2],
)
def exported(request, tmp_path_factory) -> Exported:
    name, side = request.param
    model = build(name)
    inputs = (torch.randn(2, 3, side, side),)
    path = tmp_path_factory.mktemp("onnx") / "right.onnx"
    assert export(model, path, example_inputs=inputs).ok
    return Exported(model, inputs, path)


def middle(found: list):
    return found[len(found) // 2] if found else None


def nodes(model: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in kinds]


def change_weight(model: onnx.ModelProto, change: Callable) -> str:
    weights = {t.name: t for t in model.graph.initializer if len(t.dims) in (2, 4)}
    node = middle(
        [n for n in nodes(model, "Conv", "MatMul", "Gemm") if set(n.input) & set(weights)]
    )
    tensor = next(weights[name] for name in node.input if name in weights)
    value = numpy_helper.to_array(tensor).copy()
    change(value)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return node.name


def initializer(model: onnx.ModelProto) -> str:
    def noisy(value: np.ndarray) -> None:
        # A constant for all elements would be lost in a LayerNorm behind them.
        value += np.random.default_rng(0).choice([-1e-3, 1e-3], value.shape).astype(value.dtype)

    return change_weight(model, noisy)


def one_element(model: onnx.ModelProto) -> str:
    def add(value: np.ndarray) -> None:
        value.reshape(-1)[value.size // 2] += 1e-3

    return change_weight(model, add)


def two_channels(model: onnx.ModelProto) -> str:
    def swap(value: np.ndarray) -> None:
        value[[0, 1]] = value[[1, 0]]

    return change_weight(model, swap)


def pads(model: onnx.ModelProto) -> str:
    """Shift one convolution by a row."""
    node = middle([n for n in nodes(model, "Conv") if any(attribute(n, "pads").ints)])
    before = list(attribute(node, "pads").ints)
    attribute(node, "pads").ints[:] = [before[0] + before[2], before[1], 0, before[3]]
    return node.name


def epsilon(model: onnx.ModelProto) -> str | None:
    node = middle(nodes(model, "LayerNormalization", "BatchNormalization"))
    if node is None:
        return None
    attribute(node, "epsilon").f = 1e-2
    return node.name


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


def inputs_swapped(model: onnx.ModelProto) -> str | None:
    """Swap the halves of a concatenation, or scale and shift of a norm."""
    node = middle(nodes(model, "Concat"))
    first = 0
    if node is None:
        node, first = middle(nodes(model, "LayerNormalization", "BatchNormalization")), 1
    if node is None:
        return None
    node.input[first], node.input[first + 1] = node.input[first + 1], node.input[first]
    return node.name


FAULTS = [initializer, one_element, two_channels, pads, epsilon, inputs_swapped]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_middle_is_caught_and_located(exported, fault, tmp_path):
    wrong = onnx.load(exported.path)
    where = fault(wrong)
    if where is None:
        pytest.skip("has no such operator")
    path = tmp_path / "wrong.onnx"
    onnx.save(wrong, path)
    module = scope_of(next(node for node in wrong.graph.node if node.name == where))
    for reference in (exported.model, exported.path):
        found = verify_onnx(path, reference, exported.inputs, level=Level.QUICK)
        assert not found.ok
        assert found.divergence is not None
        assert (found.divergence.node, found.divergence.target) == (where, module), str(found)
    assert module in dict(exported.model.named_modules())


def test_the_right_graph_holds_against_both(exported):
    for reference in (exported.model, exported.path):
        found = verify_onnx(exported.path, reference, exported.inputs, level=Level.QUICK)
        assert found.ok, str(found)
        assert found.divergence is None
