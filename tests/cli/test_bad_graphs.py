"""Bad input, as a user meets it: one line on standard error, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewrite.cli.main import main
from tests.cli.running import refused
from tests.onnx.graphs import (
    BAD,
    Net,
    add_to,
    embedding,
    external,
    graph,
    node,
    rename_external,
    saved,
    set_attribute,
    unknown_operator,
    weight,
)

SHAPE = "2x3x6x6"


def the_net() -> nn.Module:
    """Return the model behind every graph here; the commands name it as a factory."""
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model.eval()


class NaN(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        nn.init.constant_(self.weight, float("nan"))


class Fails(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, x):
        raise RuntimeError("no use\nat all")


class Untraceable(Fails):
    def forward(self, x):
        return nn.Linear.forward(self, x if x.sum() > 0 else -x)


class BatchStatistics(nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(4, track_running_stats=False)


MODEL = f"{__name__}:the_net"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# -- graphs ------------------------------------------------------------------------------------


def folder(place, net):
    (place / "net.onnx").mkdir()
    return place / "net.onnx"


def last_byte_lost(place, net):
    path = saved(place, graph(net))
    path.write_bytes(path.read_bytes()[:-1])
    return path


def text(place, net):
    path = place / "net.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    return path


def custom_operator(place, net):
    model = graph(net)
    node(model, "relu").op_type, node(model, "relu").domain = "Frobnicate", "my.domain"
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    return saved(place, model)


def future_format(place, net):
    model = graph(net)
    model.ir_version = 99
    return saved(place, model)


def data_absolute(place, net):
    path = external(place, net)
    rename_external(path, str(place / "big.data"))
    return path


def data_of_a_subgraph_outside(place, net):
    model = graph(net)
    inner = numpy_helper.from_array(np.ones(4, np.float32), "inner")
    inner.ClearField("raw_data")
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="../secret")
    value = helper.make_tensor_value_info("o", TensorProto.FLOAT, [4])
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["o"])], "branch", [], [value], [inner]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    model.graph.node.append(
        helper.make_node("If", ["condition"], ["p"], then_branch=branch, else_branch=branch)
    )
    return saved(place, model)


def data_entry(key, value):
    def make(place, net):
        path = external(place, net)
        model = onnx.load(path, load_external_data=False)
        entries = model.graph.initializer[0].external_data
        next(entry for entry in entries if entry.key == key).value = value
        path.write_bytes(model.SerializeToString())
        return path

    make.__name__ = f"data_{key}_{value}"
    return make


def nan_in_external_data(place, net):
    model = graph(net)
    add_to(model, "first_weight", float("nan"), 3)
    path = place / "big.onnx"
    onnx.save(model, path, save_as_external_data=True, location="big.data", size_threshold=0)
    return path


def nan_in_a_constant(place, net):
    model = graph(net)
    add_to(model, "first_weight", float("nan"), 3)
    tensor = weight(model, "first_weight")
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.initializer.remove(tensor)
    return saved(place, model)


def nan_in_half(place, net):
    model = graph(net)
    model.graph.initializer.append(
        numpy_helper.from_array(np.array([np.nan, 1], np.float16), "half")
    )
    return saved(place, model)


def unknown_type(place, net):
    model = graph(net)
    weight(model, "first_weight").data_type = 77
    return saved(place, model)


def negative_size(place, net):
    model = graph(net)
    weight(model, "first_weight").dims[0] = -8
    return saved(place, model)


def sequence_input(place, net):
    model = graph(net)
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1]))
    return saved(place, model)


def endless_input(place, net):
    model = graph(net)
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 10**9
    return saved(place, model)


def weights_that_do_not_fit(place, net):
    model = graph(net)
    weight(model, "middle_weight").CopyFrom(
        numpy_helper.from_array(np.zeros((8, 7, 3, 3), np.float32), "middle_weight")
    )
    return saved(place, model)


WRONG_FILES = {
    **{make: words.replace("outside", "outside of the model's folder; keep it beside")
       for make, words in BAD.items()},
    folder: "is a folder; give the .onnx file inside it",
    last_byte_lost: "truncated one; export or download it again",
    text: "not an ONNX file",
    unknown_operator: "Frobnicate with domain_version of 18; replace it by operators of the opset",
    custom_operator: "my.domain:Frobnicate(-1) is not a registered function/op; replace it",
    future_format: "refuses it: Unsupported model IR version: 99",
    data_absolute: "outside of the model's folder",
    data_of_a_subgraph_outside: "inner: external data '../secret' lies outside",
    data_entry("length", "17"): "has 17 bytes, its shape needs 864",
    data_entry("length", "abc"): "no readable place: invalid literal for int()",
    data_entry("offset", "-4"): "no readable place: External data offset must be non-negative",
    data_entry("offset", "99999999"): "too short: bytes 99999999",
    data_entry("location", "a\0b"): "embedded null",
    nan_in_external_data: "first_weight: 1 of 216 values are NaN; export it again",
    nan_in_a_constant: "constant first_weight: 1 of 216 values are NaN",
    nan_in_half: "half: 1 of 2 values are NaN",
    unknown_type: "first_weight is of no type that ONNX knows (77)",
    negative_size: "first_weight has a negative size: (-8, 3, 3, 3)",
    sequence_input: "input s is no tensor",
    weights_that_do_not_fit: "net.onnx refuses (x float32(",
}  # fmt: skip


@pytest.mark.parametrize("make", WRONG_FILES, ids=lambda make: make.__name__)
def test_a_bad_graph(here, capfd, make):
    path, words = make(here, the_net()), WRONG_FILES[make]
    right = saved(here, graph(the_net()), "right.onnx")
    written = ("--report", "report.json", "--repro", "repro")
    refused(capfd, words, "verify", path, *written)
    for others in ((MODEL, path), (right, path), (path, right)):
        refused(capfd, words, "verify", *others, "--input", SHAPE, *written)


def test_an_input_that_no_memory_holds(here, capfd):
    path = endless_input(here, the_net())
    right = saved(here, graph(the_net()), "right.onnx")
    refused(capfd, "would take 11175870895 GiB; pass --input", "verify", path)
    for others in ((MODEL, path), (right, path), (path, right)):
        words = "net.onnx: input x is batchx3x1000000000x1000000000, not 2x3x6x6"
        refused(capfd, words, "verify", *others, "--input", SHAPE)


def test_a_data_entry_that_onnxruntime_does_not_know_is_one_line(here, capfd):
    path = external(here, the_net())
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data.add(key="colour", value="red")
    path.write_bytes(model.SerializeToString())
    refused(capfd, "big.onnx: onnxruntime", "verify", str(path), "--quick")


def test_the_command_itself_shows_no_traceback(here):
    path = last_byte_lost(here, the_net())
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "rewrite", "verify", path],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)


# -- inputs ------------------------------------------------------------------------------------


def renamed(place: Path) -> Path:
    model = graph(the_net())
    model.graph.input[0].name = node(model, "conv1").input[0] = "image"
    return saved(place, model, "renamed.onnx")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("3", "input x is batchx3x6x6, not 3"),
        ("2x2x6x6", "input x is batchx3x6x6, not 2x2x6x6"),
        ("2x3x7x7", "input x is batchx3x6x6, not 2x3x7x7"),
        ("2x3x6x6:int64", "takes float32, not int64; write --input 2x3x6x6:float32"),
        ("2x3x6x6,1", "the graph's inputs are x; given: 2 by position"),
        ("0x3x6x6", "not a shape"),
        ("999999999x3x999x999", "give a smaller shape"),
        ("missing.npz", "missing.npz: no such file"),
        ("wrong.npz", "the graph's inputs are x; given: 'wrong'"),
        ("cut.npz", "cut.npz: cannot be read as arrays: is a damaged archive"),
    ],
)
@pytest.mark.parametrize("first", [(), (MODEL,), ("right.onnx",)], ids=["alone", "model", "graph"])
def test_inputs_that_do_not_fit(here, capfd, given, words, first):
    saved(here, graph(the_net()), "right.onnx")
    np.savez("wrong.npz", wrong=np.ones((2, 3, 6, 6), np.float32))
    Path("cut.npz").write_bytes(Path("wrong.npz").read_bytes()[:300])
    refused(capfd, words, "verify", *first, "right.onnx", "--input", given, "--report", "r.json")


def test_names_that_do_not_match(here, capfd):
    saved(here, graph(the_net()), "right.onnx")
    np.savez("x.npz", x=np.ones((2, 3, 6, 6), np.float32))
    np.savez("image.npz", image=np.ones((2, 3, 6, 6), np.float32))
    path = renamed(here)
    refused(capfd, "inputs are image; given: 'x'", "verify", MODEL, path, "--input", "x.npz")
    refused(capfd, "unexpected keyword", "verify", MODEL, path, "--input", "image.npz")
    model = graph(the_net())
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    two = saved(here, model, "two.onnx")
    refused(capfd, "two.onnx: its inputs are x, mask, not x", "verify", two, "right.onnx")
    refused(capfd, "right.onnx: its inputs are x, not x, mask", "verify", "right.onnx", two)
    refused(capfd, "inputs are x, mask; given: 1", "verify", MODEL, two, "--input", SHAPE)


def test_integers_fed_as_floats(here, capfd):
    path = saved(here, embedding(), "ids.onnx")
    hint = "takes int64, not float32; write --input 3:int64"
    refused(capfd, hint, "verify", path, "--input", "3")
    refused(capfd, hint, "verify", path, path, "--input", "3")
    refused(capfd, "ids.onnx refuses (ids int64(99,))", "verify", path, "--input", "99:int64")


# -- places to write to ------------------------------------------------------------------------


def test_a_report_takes_no_other_file_s_place(here, capfd):
    saved(here, graph(the_net()), "right.onnx")
    refused(capfd, "another place", "verify", "right.onnx", "--report", "right.onnx")
    refused(capfd, "give each file a place", "export", MODEL, "o.onnx", "--report", "o.onnx")
    refused(capfd, "does not exist", "verify", "right.onnx", "--report", "nowhere/r.json")
    refused(capfd, "file name too long", "verify", "right.onnx", "--report", "x" * 300)


def test_a_repro_is_written_completely_or_not_at_all(here, capfd):
    saved(here, graph(the_net()), "right.onnx")
    model = graph(the_net())
    set_attribute(model, "norm", epsilon=1e-2)
    saved(here, model, "wrong.onnx")
    verify = ("verify", "right.onnx", "wrong.onnx", "--quick", "--report", "r.json", "--repro")
    Path("file").touch()
    Path("taken/repro.py").mkdir(parents=True)
    refused(capfd, "file: is a file", *verify, "file")
    refused(capfd, "create it first", *verify, "nowhere/repro")
    refused(capfd, "repro.py: is a folder; give another place", *verify, "taken")
    refused(capfd, "cannot be written", *verify, "/proc/repro")
    assert main([*verify, "repro"]) == 1
    assert len(list(Path("repro").iterdir())) == 5
    assert not list(here.glob(".*"))


@pytest.mark.parametrize("content", ["cut", "random", "random pickle", "damaged directory"])
def test_a_bad_checkpoint(here, capfd, content):
    saved(here, graph(the_net()), "right.onnx")
    torch.save(nn.Linear(4, 2), "model.pt")
    whole, noise = Path("model.pt").read_bytes(), np.random.default_rng(0).bytes(3000)
    bad, words = {
        "cut": (whole[:-200], "is truncated or damaged"),
        "random": (noise, "is no checkpoint, or a damaged one"),
        "random pickle": (b"\x80\x02" + noise, "is no checkpoint, or a damaged one"),
        "damaged directory": (undecodable(whole), "is truncated or damaged"),
    }[content]
    Path("bad.pt").write_bytes(bad)
    for others in (("bad.pt", "model.pt"), ("model.pt", "bad.pt"), ("bad.pt", "right.onnx")):
        refused(capfd, f"bad.pt: {words}", "verify", *others, "--report", "r.json")
    refused(capfd, f"bad.pt: {words}", "export", "bad.pt", "out.onnx", "--report", "r.json")


def undecodable(archive: bytes) -> bytes:
    """Return a zip archive whose directory names its last file in no encoding."""
    at = archive.rindex(b"PK\x01\x02")
    flags = (int.from_bytes(archive[at + 8 : at + 10], "little") | 0x800).to_bytes(2, "little")
    return archive[: at + 8] + flags + archive[at + 10 : at + 46] + b"\xff" + archive[at + 47 :]


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("NaN", [], "o.onnx: initializer weight: 8 of 8 values are NaN"),
        ("Fails", [], "Fails: does not run on (2x4): no use; pass another --input"),
        ("Untraceable", [], "Untraceable: torch.onnx.export fails: Could not guard on"),
        ("BatchStatistics", [], "has no running statistics"),
        ("the_net", [], "does not run on (2x4)"),
        ("NaN", ["--dynamic-shape", "input:9=w"], "input has 2 axes, counted from 0"),
        ("NaN", ["--dynamic-shape", "z:1=w"], "z: no such input; the inputs are input"),
    ],
)
def test_an_export_that_fails_leaves_nothing(here, capfd, model, options, words):
    export = ("export", f"{__name__}:{model}", "o.onnx", "--input", "2x4", "--report", "r.json")
    refused(capfd, words, *export, *options)
    Path("o.onnx").write_text("mine")
    refused(capfd, words, *export, *options, "--force")


def test_an_export_to_a_bad_place(here, capfd):
    export = ("export", MODEL, "--input", SHAPE)
    Path("file").touch()
    refused(capfd, "the folder file does not exist", *export, "file/o.onnx")
    refused(capfd, "file name too long", *export, "x" * 300 + ".onnx")
    refused(capfd, "/proc/o.onnx: no such file or directory", *export, "/proc/o.onnx")
    Path("o.onnx.data").write_text("mine")
    refused(capfd, "o.onnx.data: already exists", *export, "o.onnx", "--external-data")
