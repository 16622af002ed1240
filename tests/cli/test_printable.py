"""What stands in a file commands no terminal and no page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import rewrite
from rewrite.cli.main import main

RED = "\x1b[31mred\x1b]0;title\x07<script>alert(1)</script>"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("name", [RED, "\u202eabc"])
def test_keys_of_a_state_dict_are_shown_as_text(tmp_path: Path, capsys, name: str) -> None:
    torch.save({name: torch.ones(2)}, tmp_path / "state.pt")
    factory = 'torch.nn:Linear({"in_features": 2, "out_features": 2})'
    code, said = shown(capsys, "inspect", str(tmp_path / "state.pt"), "--factory", factory)
    assert code == 2 and "unexpected" in said and said.count("\n") == 1
    assert said.rstrip("\n").isprintable()


def test_a_graph_whose_names_command_a_terminal_is_refused(tmp_path: Path, capsys) -> None:
    def graph(name: str) -> str:
        value = helper.make_tensor_value_info
        node = helper.make_node("Relu", ["x"], ["y"], name=name)
        made = helper.make_graph(
            [node], "g", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, [2])]
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(made, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
        return str(tmp_path / "m.onnx")

    code, said = shown(capsys, "verify", graph(RED))
    assert code == 2 and said.rstrip("\n").isprintable() and "commands a terminal" in said
    assert shown(capsys, "verify", graph("relu"))[0] == 0
    path = Path(graph("relu"))
    path.write_bytes(path.read_bytes().replace(b"relu", b"re\xff\xfe"))
    code, said = shown(capsys, "verify", str(path))
    assert code == 2 and "is no text" in said and said.count("\n") == 1


def test_a_page_holds_names_as_text(tmp_path: Path, capsys, monkeypatch) -> None:
    """The name of a file is the one text of a page that no check of a model has seen."""
    monkeypatch.chdir(tmp_path)
    name = "<img src=x onerror=alert(1)>.pt"
    rewrite.save(nn.Sequential(nn.Linear(2, 2)).eval(), name)
    assert main(["compare", name, name, "--input", "1x2", "--html", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<img" not in page and "&lt;img src=x" in page


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        (["inspect", "m.pt"], {0}),
        (["convert", "--weight-norm", "m.pt", "-o", "out.pt", "--html", "page.html"], {2}),
        (["convert", "--fold", "m.pt", "-o", "out.pt", "--html", "page.html"], {2}),
        (["compare", "m.pt", "m.pt", "--html", "page.html"], {2}),
    ],
)
def test_an_input_that_does_not_fit_is_no_traceback(
    tmp_path: Path, monkeypatch, capfd, command, codes
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite.save(nn.Sequential(nn.Linear(2, 2)).eval(), "m.pt")
    assert main([*command, "--input", "1x3x8x8"]) in codes
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"m.pt"}


@pytest.mark.parametrize(("encoding", "beta"), [("ascii", "\\u03b2"), ("utf-8", "β")])
def test_a_terminal_of_another_encoding_gets_escapes_and_no_error(encoding: str, beta: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "rewrite", "passes"],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True, encoding=encoding, check=True, timeout=120,
    )  # fmt: skip
    assert beta in said.stdout and said.stderr == ""
