from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import rewrite
from rewrite.cli.main import main
from tests.cli.running import run

MODEL = "torchvision:squeezenet1_1"
SHAPE = "1x3x32x32"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    torch.manual_seed(0)
    assert main(["export", MODEL, str(path), "--input", SHAPE, "--quiet"]) == 0
    return path


@pytest.fixture(autouse=True)
def same_weights(monkeypatch):
    """torchvision draws weights anew on every load: draw the same ones."""
    import rewrite.checkpoint.load as checkpoint

    load = checkpoint.load

    def seeded(*args, **kwargs):
        torch.manual_seed(0)
        return load(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load", seeded)


@pytest.fixture
def spoiled(exported, tmp_path):
    model = onnx.load(exported)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    value = numpy_helper.to_array(tensor) + np.float32(1e-3)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    path = tmp_path / "spoiled.onnx"
    onnx.save(model, path)
    return path


def test_a_graph_alone(exported, capsys):
    assert main(["verify", str(exported), "--expect-no", "BatchNormalization"]) == 0
    assert "optimization levels" in capsys.readouterr().out


def test_a_broken_expectation_exits_with_1(exported, capsys):
    assert main(["verify", str(exported), "--quick", "--expect", "Conv=1"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--expect-no=BatchNormalisation", "--expect=Clipp=2"])
def test_a_mistyped_operator_is_no_gate(exported, capsys, flag):
    assert main(["verify", str(exported), flag]) == 2
    assert "no such operator; did you mean" in capsys.readouterr().err
    assert main(["verify", str(exported), "--expect-no", "OfAnotherDomain"]) == 0


def test_a_wrong_graph_exits_with_1_and_reports(exported, spoiled, tmp_path):
    report = tmp_path / "report.json"
    assert main(["verify", str(exported), str(spoiled), "--quick", "--report", str(report)]) == 1
    assert json.loads(report.read_text())["divergence"]["function"] == "Conv"


def test_a_file_of_named_inputs(exported, tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.ones((1, 3, 32, 32), np.float32))
    assert main(["verify", str(exported), "--quick", "--input", str(path)]) == 0
    np.savez(path, wrong=np.ones((1, 3, 32, 32), np.float32))
    assert main(["verify", str(exported), "--quick", "--input", str(path)]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "missing.onnx"], "no such file"),
        (["verify", MODEL], "nothing to be held to"),
        (["verify", MODEL, MODEL, "--expect", "Conv=1"], "about ONNX files"),
        (["verify", "x.onnx", "--expect", "Conv"], "write it as GroupNormalization=53"),
        (["export", MODEL, "/nowhere/x.onnx"], "does not exist"),
        (["export", MODEL, "x.onnx", "--dynamic-shape", "x"], "write it as x:2=height"),
        (["export", MODEL, "x.onnx", "--input", "3xx"], "write it as 1x3x224x224"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_two_models(capsys):
    assert main(["verify", MODEL, MODEL, "--quick", "--input", SHAPE]) == 0
    assert "exact-in-eval holds" in capsys.readouterr().out
    other = "torchvision:squeezenet1_0"
    assert main(["verify", MODEL, other, "--quick", "--input", SHAPE]) == 1


def test_a_graph_against_its_model(exported):
    assert main(["verify", MODEL, str(exported), "--quick", "--input", SHAPE]) == 0


def reshaped(path, kind: str, *attributes):
    """Write a graph that flattens images of any declared size; a Reshape to 108 takes 6x6 alone."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node(kind, ["x", *attributes], ["y"], "flat")],
        "flat",
        [value("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [value("y", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(np.array([-1, 108]), "shape")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return str(path)


def test_a_size_that_one_graph_alone_refuses(tmp_path):
    fixed = reshaped(tmp_path / "fixed.onnx", "Reshape", "shape")
    free = reshaped(tmp_path / "free.onnx", "Flatten")
    given = ("--input", "2x3x6x6", "--report", str(tmp_path / "report.json"))
    assert main(["verify", fixed, free, *given]) == 0
    assert main(["verify", free, fixed, *given]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    wrong = [check for check in report["checks"] if not check["ok"]]
    assert any("free.onnx" in c["name"] and "(1, 3, 3, 3)" in c["found"] for c in wrong)


def test_a_swap_that_is_held_to_equality_is_told_which_contract_it_has(tmp_path, capsys):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
    norm = torch.nn.Sequential(*layers)
    swapped = torch.nn.Sequential(layers[0], torch.nn.GroupNorm(2, 4), layers[2])
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), layers[1], layers[2])
    for name, model in (("a", norm), ("b", swapped), ("c", other)):
        rewrite.save(model, tmp_path / f"{name}.pt")

    def judged(second: str, *flags: str) -> str:
        files = [str(tmp_path / "a.pt"), str(tmp_path / f"{second}.pt")]
        code = main(["verify", *files, "--input", "1x3x4x4", *flags])
        assert code == ("--contract" not in flags)
        return capsys.readouterr().err

    assert "--contract approximate" in judged("b")
    assert "--contract" not in judged("c")
    assert "--contract" not in judged("b", "--contract", "approximate")


def test_quiet_prints_the_line_that_failed(capsys, model_here: Path) -> None:
    model = rewrite.load(model_here)
    with torch.no_grad():
        model[0].weight[0] += 0.1
    rewrite.save(model, "other.pt")
    code, out, err = run(capsys, "verify", "model.pt", "other.pt", "--quick", "--quiet")
    assert ((code, out, err.count("\n")) == (1, "", 1) and "off by" in err) or "differs by" in err
