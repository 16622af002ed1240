"""rewrite.provenance: what a report says of places; nothing in it names a home folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from rewrite.cli.main import main
from rewrite.graph.capture import capture
from rewrite.html.pages import onnx_page
from rewrite.provenance import provenance, shown_argument, shown_path


def test_a_file_of_a_package_is_named_as_it_is_imported() -> None:
    assert shown_path(nn.__file__) == "torch/nn/__init__.py"


def test_a_file_below_the_current_folder_is_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(str(tmp_path / "models" / "net.py")) == "models/net.py"
    assert shown_path("models/net.py") == "models/net.py"


def test_the_deepest_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "venv" / "site-packages"), str(tmp_path)])
    assert shown_path(str(tmp_path / "venv" / "site-packages" / "net.py")) == "net.py"
    assert shown_path(str(tmp_path) + "2/net.py") == str(tmp_path) + "2/net.py"


def test_a_home_folder_is_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "maria"))
    assert shown_path(str(tmp_path / "maria" / "models" / "a.pt")) == "~/models/a.pt"
    assert shown_argument(f"--report={tmp_path}/maria/out.json") == "--report=~/out.json"
    file = tmp_path / "maria" / "a.pt"
    file.parent.mkdir()
    file.write_bytes(b"")
    found = provenance([file], ["verify", str(file)])
    assert found["command"] == "rewrite verify ~/a.pt" and "maria" not in json.dumps(found)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))


def test_lines_of_code_are_relative() -> None:
    torch.manual_seed(0)
    captured = capture(Net())
    place = [captured.source(node) for node in captured.nodes() if node.op == "call_function"]
    found = rewrite.verify(Net().eval(), Net().eval(), torch.ones(1, 3), level="quick")
    assert found.divergence is not None
    for source in (place[0], found.divergence.source):
        assert "test_provenance.py:" in str(source)
        assert not str(source).startswith("/")


def test_no_report_has_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(0)
    rewrite.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), "a.pt")
    rewrite.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), "b.pt")
    given = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    reports = ["--report", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main(["verify", *given, "--input", "1x3x8x8", *reports]) == 1
    capsys.readouterr()
    for name in ("r.json", "r.html"):
        assert str(tmp_path) not in Path(name).read_text(encoding="utf-8"), name


def test_no_page_of_a_graph_has_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = str(tmp_path / "net.onnx")
    found = rewrite.export(Net().eval(), graph, example_inputs=torch.zeros(1, 3))
    text = onnx_page(found).render()
    assert "verification of net.onnx" in text and str(tmp_path) not in text
