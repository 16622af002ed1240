"""The error of each node: nothing in a right graph, from the wrong node on in a wrong one."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import rewrite
from models.randomize import randomize_norms_
from rewrite.cli.main import main
from rewrite.onnx.node_data import node_data, node_errors

X = torch.randn(2, 3, 9, 9)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Sigmoid())
    return randomize_norms_(net).eval()


@pytest.fixture
def graph(model: nn.Module, tmp_path: Path) -> Path:
    rewrite.export(model, tmp_path / "model.onnx", example_inputs=X)
    return tmp_path / "model.onnx"


def test_every_node_of_a_right_graph_is_near_under_its_own_name(model, graph) -> None:
    errors = node_errors(graph, model, X)
    assert set(errors) == {node.name for node in onnx.load(graph).graph.node}
    assert max(errors.values()) < 1e-5


def test_a_wrong_weight_shows_from_its_node_on(model, graph) -> None:
    proto = onnx.load(graph)
    second = [node for node in proto.graph.node if node.op_type == "Conv"][1]
    weight = next(t for t in proto.graph.initializer if t.name == second.input[1])
    value = numpy_helper.to_array(weight).copy()
    value[0] *= 1.5
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    onnx.save(proto, graph)
    errors = node_errors(graph, model, X)
    names = [node.name for node in proto.graph.node]
    at = names.index(second.name)
    assert all(errors[name] < 1e-5 for name in names[:at])
    assert errors[second.name] > 1e-2


def test_nodes_without_a_name_go_by_the_adapters_and_by_their_first_output(model, graph) -> None:
    named = node_errors(graph, model, X)
    proto = onnx.load(graph)
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, graph)
    errors = node_errors(graph, model, X)
    ids = ["node", *(f"node_{number}" for number in range(1, len(proto.graph.node)))]
    outputs = [node.output[0] for node in proto.graph.node]
    assert set(errors) == {*ids, *outputs}
    assert [errors[name] for name in ids] == [errors[name] for name in outputs]
    assert [errors[name] for name in ids] == list(named.values())


def test_two_nodes_of_one_name_have_an_error_each(model, graph) -> None:
    proto = onnx.load(graph)
    first, second = [node for node in proto.graph.node if node.op_type == "Conv"]
    second.name = first.name
    weight = next(t for t in proto.graph.initializer if t.name == second.input[1])
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, graph)
    errors = node_errors(graph, model, X)
    assert errors[first.name] < 1e-5 < 1e-2 < errors[f"{first.name}_1"]


class Branching(nn.Module):
    """A graph with an If: its branches are graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.cond(x.sum() > 0, self.one.forward, self.other.forward, (x,)))


def test_an_if_has_the_error_of_the_branch_that_ran(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Branching().eval()
    rewrite.export(net, tmp_path / "if.onnx", example_inputs=X)
    proto = onnx.load(tmp_path / "if.onnx")
    errors = node_errors(tmp_path / "if.onnx", net, X)
    assert set(errors) == {node.name for node in proto.graph.node}
    (branching,) = [node.name for node in proto.graph.node if node.op_type == "If"]
    assert max(errors.values()) < 1e-5
    net.one.weight.data *= 2
    net.other.weight.data *= 2
    assert node_errors(tmp_path / "if.onnx", net, X)[branching] > 1e-2


def test_it_is_node_data_of_model_explorer() -> None:
    found = json.loads(node_data({"a": 0.0, "b": 2e-3, "c": float("inf")}))
    assert found["results"] == {"a": {"value": 0.0}, "b": {"value": 2e-3}}
    assert [stop["stop"] for stop in found["gradient"]] == [0.0, 1.0]


def test_the_command_writes_it(model, graph, monkeypatch, capsys) -> None:
    monkeypatch.chdir(graph.parent)
    rewrite.save(model, "model.pt")
    arguments = ["verify", "model.onnx", "model.pt", "--quick", "--node-data", "errors.json"]
    assert main([*arguments, "--input", "2x3x9x9"]) == 0
    assert json.loads(Path("errors.json").read_text())["results"]
    assert main(["verify", "model.pt", "model.pt", "--node-data", "errors.json"]) == 2
    assert main(["verify", "model.onnx", "--node-data", "errors.json"]) == 2
    assert main(["verify", "model.onnx", "model.pt", "--node-data", "model.pt"]) == 2
