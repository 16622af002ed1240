"""The comparison of folders over the corpus: it must count right and notice what is wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from benchmarks import fold_peers
from benchmarks.corpus import UnbuildableError

SMALL = "timm:test_efficientnet"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm, self.other = nn.InstanceNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.bn(self.conv(x))))
        x = F.batch_norm(x, self.other.running_mean, self.other.running_var)
        return self.other(torch.sigmoid(x))


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if name == "none":
        raise UnbuildableError("there is no such model")
    torch.manual_seed(0)
    return models.randomize_norms_(Model()).eval(), (torch.randn(2, 3, 8, 8),)


def row(tool: str, name: str = "x", **values: Any) -> dict[str, Any]:
    given = {"status": "run", "dtype": "float64", "norms": 5, "left": 0, "off": 1e-15}
    return {"name": f"{name} by {tool}", "architecture": name, "tool": tool} | given | values


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(function: Any) -> dict[str, Any]:
        monkeypatch.setitem(fold_peers.FOLDERS, "ours", function)
        return fold_peers.measure("x by ours", build)

    return use


def test_norms_are_counted_by_their_running_mean_and_instance_norms_are_not() -> None:
    assert fold_peers.run(*build("x"))[1] == 2


def test_a_real_fold_is_right_in_float64() -> None:
    found = fold_peers.measure("x by ours", build)
    assert found["dtype"] == "float64" and found["norms"] == 2
    assert found["left"] == 1 and found["off"] < 1e-10 and not fold_peers.is_wrong(found)


def test_a_tool_that_changes_the_function_is_wrong(folder: Any) -> None:
    def loses_the_norm(model: nn.Module, inputs: Any) -> nn.Module:
        model.bn = nn.Identity()
        model.norm = nn.Identity()
        return model

    found = folder(loses_the_norm)
    assert found["left"] == 1 and found["off"] > 1e-3 and found["rounding"] < 1e-9
    assert fold_peers.is_wrong(found)


def test_a_tool_that_raises_or_returns_what_does_not_run_fails(folder: Any) -> None:
    def raises(model: nn.Module, inputs: Any) -> nn.Module:
        raise ValueError("no")

    assert fold_peers.failure(folder(raises)) == "ValueError"
    assert fold_peers.failure(folder(lambda model, inputs: None)) == "TypeError"


def test_a_model_that_cannot_be_built_or_runs_out_of_time_is_a_row() -> None:
    assert fold_peers.failure(fold_peers.measure("none by ours", build)) == "unbuildable"
    assert fold_peers.failure({"status": "timeout"}) == "timeout"


def test_a_model_that_amplifies_rounding_is_not_called_wrong() -> None:
    assert fold_peers.is_wrong(row("ours", off=2e-3))
    assert fold_peers.is_wrong(row("ours", off=2e-3, rounding=1e-6))
    assert not fold_peers.is_wrong(row("ours", off=2e-3, rounding=1e-4))


def test_the_totals_add_up_and_failures_are_not_folds() -> None:
    rows = [
        row("torch.fx fuse", error="TraceError: x", left=None),
        row("torchao pt2e", left=2, off=0.5, rounding=1e-15),
        row("ours", left=1),
        *(row(tool, "fixed", norms=0) for tool in fold_peers.TOOLS),
        row("ours", "half done"),
    ]
    text = fold_peers.summary(rows, 3)
    assert "| torch.fx fuse | 0 | 0 | 0 | 5 | 1 | 0 |" in text
    assert "| torchao pt2e | 0 | 2 | 3 | 0 | 0 | 1 |" in text
    assert "| ours | 4 | 1 | 0 | 0 | 0 | 0 |" in text
    assert "| x | 5 | fails (TraceError) | 2, **wrong** (0.5) | 1 |" in text
    assert "No batch norm runs in: fixed." in text and "half done" not in text


def test_a_sweep_writes_one_row_a_tool_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(fold_peers, "TOOLS", ("torch.fx fuse", "ours"))
    results = tmp_path / "rows.jsonl"
    done = row("torch.fx fuse", SMALL)
    results.write_text(json.dumps(done) + "\n", encoding="utf-8")
    options = argparse.Namespace(results=results, seconds=60, megabytes=10_000, workers=1)
    for _ in range(2):
        fold_peers.sweep([SMALL], options)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r["tool"] for r in rows] == ["torch.fx fuse", "ours"]
    assert rows[1]["norms"] > 0 and rows[1]["left"] == 0 and rows[1]["off"] < 1e-10
