"""Noise of arithmetic: what is stored moves wherever it stands, long sums have a bound."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.equivalence.verification import Level
from rewrite.onnx.export import export
from rewrite.onnx.file import open_onnx
from rewrite.onnx.noise import long_sums, perturbed_feed, perturbed_graph
from rewrite.onnx.runtime import run, session
from rewrite.onnx.verify import verify_onnx

make = helper.make_node


def saved(tmp_path, nodes, inputs, outputs, stored=(), name="graph.onnx"):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value(n, TensorProto.FLOAT, shape) for n, shape in inputs.items()],
        [value(n, TensorProto.FLOAT, shape) for n, shape in outputs.items()],
        list(stored),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / name)
    return tmp_path / name


def weights(count=6):
    rng = np.random.default_rng(0)
    return [
        numpy_helper.from_array(
            rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / 4, f"w{index}"
        )
        for index in range(count)
    ]


def deep(tmp_path, place):
    """Return six convolutions whose weights are initializers, constants, or in a subgraph."""
    held = weights()
    stored = held if place == "initializer" else []
    nodes = []
    x = "x"
    for index, weight in enumerate(held):
        if place == "constant":
            nodes.append(make("Constant", [], [weight.name], value=weight))
        if place == "subgraph":
            branch = helper.make_graph(
                [make("Identity", [f"inner{index}"], [f"out{index}"])],
                "branch",
                [],
                [helper.make_tensor_value_info(f"out{index}", TensorProto.FLOAT, [16, 16, 3, 3])],
                [numpy_helper.from_array(numpy_helper.to_array(weight), f"inner{index}")],
            )
            nodes.append(make("If", ["yes"], [weight.name], then_branch=branch, else_branch=branch))
        nodes.append(make("Conv", [x, weight.name], [f"c{index}"], pads=[1] * 4))
        nodes.append(make("Tanh", [f"c{index}"], [f"t{index}"]))
        x = f"t{index}"
    if place == "subgraph":
        stored = [numpy_helper.from_array(np.array(True), "yes")]
    shape = ["n", 16, 12, 12]
    return saved(tmp_path, nodes, {"x": shape}, {x: shape}, stored)


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
def test_weights_are_rounded_wherever_they_stand(tmp_path, place):
    path = deep(tmp_path, place)
    opened = open_onnx(path)
    x = {"x": np.random.default_rng(1).standard_normal((1, 16, 12, 12)).astype(np.float32)}
    before = run(session(opened, "disabled"), x)[0]
    moved = run(session(perturbed_graph(opened), "disabled"), x)[0]
    assert 1e-8 < np.abs(moved - before).max() < 1e-3
    found = verify_onnx(path)
    assert found.ok, str(found)


def test_numbers_that_somebody_chose_stay():
    feed = {
        "mask": np.array([[0, 1, 1]], np.float32),
        "ids": np.array([1, 2]),
        "image": np.linspace(-1, 1, 7, dtype=np.float32),
    }
    moved = perturbed_feed(feed)
    assert np.array_equal(moved["mask"], feed["mask"])
    assert np.array_equal(moved["ids"], feed["ids"])
    assert not np.array_equal(moved["image"], feed["image"])
    np.testing.assert_allclose(moved["image"], feed["image"], rtol=1.3e-7)


def test_a_mask_of_large_numbers_does_not_drown_the_noise(tmp_path):
    """(1 - mask) * -1e9: one rounding of the 1 would be 60 in the logits."""
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    large = numpy_helper.from_array(np.array(-1e9, np.float32), "large")
    nodes = [
        make("Sub", ["one", "mask"], ["gone"]),
        make("Mul", ["gone", "large"], ["added"]),
        make("Add", ["x", "added"], ["logits"]),
        make("Softmax", ["logits"], ["y"]),
    ]
    path = saved(tmp_path, nodes, {"x": [2, 5], "mask": [2, 5]}, {"y": [2, 5]}, [one, large])
    opened = open_onnx(path)
    feed = {
        "x": np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32),
        "mask": np.array([[1, 1, 1, 0, 0]] * 2, np.float32),
    }
    before = run(session(opened, "disabled"), feed)[0]
    moved = run(session(perturbed_graph(opened), "disabled"), perturbed_feed(feed))[0]
    assert np.abs(moved - before).max() < 1e-6


def test_sizes_are_left_alone_through_casts(tmp_path):
    """A scale of 2.3 that makes a size: 23 rows of 10, not 22."""
    nodes = [
        make("Constant", [], ["scale"], value=numpy_helper.from_array(np.array([2.3], np.float32))),
        make("Constant", [], ["ten"], value=numpy_helper.from_array(np.array([10.0], np.float32))),
        make("Mul", ["ten", "scale"], ["rows"]),
        make("Floor", ["rows"], ["floored"]),
        make("Cast", ["floored"], ["count"], to=TensorProto.INT64),
        make("Expand", ["x", "count"], ["y"]),
    ]
    path = saved(tmp_path, nodes, {"x": [1]}, {"y": [None]})
    opened = open_onnx(path)
    for seed in range(8):
        moved = perturbed_graph(opened, seed)
        constants = [n for n in moved.model.graph.node if n.op_type == "Constant"]
        assert [float(numpy_helper.to_array(n.attribute[0].t)[0]) for n in constants] == [
            float(np.float32(2.3)),
            10.0,
        ]


def test_a_long_sum_has_a_bound_of_its_length(tmp_path):
    nodes = [make("ReduceMean", ["x"], ["y"], axes=[1])]
    opened = open_onnx(saved(tmp_path, nodes, {"x": [1, "n"]}, {"y": [1, 1]}))
    ((_, bound),) = long_sums(opened)["x"]
    ones = [bound(np.ones((1, n), np.float32)) for n in (10, 1_000_000)]
    assert ones[0] == 0
    assert 5e-6 < ones[1] < 1e-5  # sqrt(n) eps / 2 is 6e-5, an eighth of it the noise
    # Where the terms cancel, the sum is as uncertain as the terms are large.
    rng = np.random.default_rng(0)
    assert bound(rng.standard_normal((1, 1_000_000)).astype(np.float32)) > 100 * ones[1]


NORMS = {
    "group_norm": (nn.GroupNorm(1, 64), (1, 64, 112, 112)),
    "far_from_zero": (nn.Sequential(nn.GroupNorm(2, 8)), (1, 8, 160, 160)),
    "layer_norm": (nn.LayerNorm([8, 128, 128]), (1, 8, 128, 128)),
    "instance_norm": (nn.InstanceNorm2d(4, affine=True), (1, 4, 256, 256)),
    "mean": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        (1, 8, 256, 256),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_right_norm_of_many_elements_is_right(tmp_path, name):
    norm, shape = NORMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape) + (5 if name == "far_from_zero" else 0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    found = export(norm.eval(), tmp_path / "norm.onnx", example_inputs=(x,))
    assert found.ok, str(found)


@pytest.mark.parametrize("fault", ["epsilon", "weight"])
def test_a_wrong_norm_of_many_elements_is_caught(tmp_path, fault):
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 64, eps=1e-3).eval()
    nn.init.normal_(norm.weight)
    path, x = tmp_path / "norm.onnx", torch.randn(1, 64, 112, 112)
    assert export(norm, path, example_inputs=(x,)).ok
    if fault == "epsilon":
        norm.eps = 0.0
    else:
        norm.weight.data[3] *= 1 + 1e-3
    found = verify_onnx(path, norm, (x,), level=Level.QUICK)
    assert not found.ok
    assert found.divergence is not None


class Centered(nn.Module):
    """A mean that is nearly nothing, subtracted: its own uncertainty is not the difference's."""

    def forward(self, x):
        return (x - x.mean((2, 3), keepdim=True)) * 3


def test_the_mean_of_what_is_centered_does_not_drown_the_noise(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 256, 256)
    x = x - x.double().mean((2, 3), keepdim=True).float()
    found = export(Centered(), tmp_path / "c.onnx", example_inputs=(x,))
    assert found.ok, str(found)
    assert found.noise < 1e-5
