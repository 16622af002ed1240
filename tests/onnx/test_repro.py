"""A diverging node as a folder that runs by itself."""

from __future__ import annotations

import subprocess
import sys

import onnx

from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    X,
    graph,
    saved,
    set_attribute,
)


def test_a_repro_of_the_diverging_node_runs_by_itself(tmp_path, net):
    model = graph(net)
    set_attribute(model, "norm", epsilon=1e-2)
    folder = tmp_path / "repro"
    verify_onnx(saved(tmp_path, model), net, X, repro=folder)
    alone = onnx.load(folder / "node.onnx")
    assert [n.name for n in alone.graph.node] == ["norm"]
    run = subprocess.run(
        [sys.executable, "repro.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "differs by" in run.stdout
    assert len((folder / "repro.py").read_text().splitlines()) <= 12
