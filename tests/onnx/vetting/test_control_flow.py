"""Branches and loops that lack what makes them one are refused before anything follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from rewrite.errors import VerificationError
from rewrite.onnx.file import open_onnx
from rewrite.onnx.structure import structure_problems
from rewrite.onnx.vetting.control_flow import check_control_flow

BODY = helper.make_graph([], "body", [], [])
BRANCHES = {"then_branch": BODY, "else_branch": BODY}
WHOLE: list[tuple[str, list[str], dict[str, Any]]] = [
    ("If", ["x"], BRANCHES),
    ("Loop", ["", "x"], {"body": BODY}),
    ("Scan", ["x", "x"], {"body": BODY, "num_scan_inputs": 1}),
    ("Scan", ["x", "x"], {"body": BODY, "num_scan_inputs": 2, "scan_input_axes": [0, 1]}),
]
LACKING: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("If", ["x"], {"then_branch": BODY}, "If has no else_branch"),
    ("If", ["x"], BRANCHES | {"else_branch": 3}, "If has no else_branch"),
    ("If", [], BRANCHES, "If has 0 inputs, at least 1"),
    ("Loop", ["", "x"], {}, "Loop has no body"),
    ("Loop", ["x"], {"body": BODY}, "Loop has 1 inputs, at least 2"),
    ("Scan", ["x"], {}, "Scan has no body"),
    ("Scan", ["x"], {"body": BODY}, "Scan has 1 inputs, and num_scan_inputs is 0"),
    ("Scan", ["x"], {"body": BODY, "num_scan_inputs": 1 << 60}, "num_scan_inputs is 11529"),
    ("Scan", ["x"], {"body": BODY, "num_scan_inputs": -1}, "num_scan_inputs is -1"),
    (
        "Scan",
        ["x"],
        {"body": BODY, "num_scan_inputs": 1, "scan_input_axes": [0, 1]},
        "Scan has 2 scan_input_axes for 1 inputs",
    ),
]


def _graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("x", "y")]
    relu = helper.make_node("Relu", ["x"], ["y"])
    return helper.make_graph([*nodes, relu], "g", ends[:1], ends[1:])


@pytest.mark.parametrize(("kind", "inputs", "attributes"), WHOLE)
def test_what_is_whole_passes(kind: str, inputs: list[str], attributes: dict[str, Any]) -> None:
    check_control_flow(Path("x.onnx"), _graph(helper.make_node(kind, inputs, ["o"], **attributes)))


@pytest.mark.parametrize(("kind", "inputs", "attributes", "said"), LACKING)
def test_what_lacks_something_is_refused(
    tmp_path: Path, kind: str, inputs: list[str], attributes: dict[str, Any], said: str
) -> None:
    node = helper.make_node(kind, inputs, ["o"], **attributes)
    model = helper.make_model(
        _graph(node), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=rf"x\.onnx: {kind} -> o: .*{said}"):
        open_onnx(tmp_path / "x.onnx")


def test_one_inside_of_another_is_refused() -> None:
    inner = helper.make_graph([helper.make_node("Loop", ["", "x"], ["o"])], "inner", [], [])
    outer = helper.make_node("If", ["x"], ["o"], then_branch=inner, else_branch=BODY)
    with pytest.raises(VerificationError, match="Loop has no body"):
        check_control_flow(Path("x.onnx"), _graph(outer))


def test_a_constant_that_names_no_output_is_the_checkers(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], [], value_ints=[1, 2])
    model = helper.make_model(
        _graph(node), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    problems = list(structure_problems(open_onnx(tmp_path / "x.onnx")))
    assert any(problem.startswith("onnx.checker: ") for problem in problems)
