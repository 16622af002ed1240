"""Loops are judged by what the file says of them: their rounds, and what they carry along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewrite.errors import VerificationError
from rewrite.onnx.vetting import loops
from rewrite.onnx.vetting.loops import check_loops

PLACE = Path("net.onnx")
FLOAT, BOOL, INT = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
value = helper.make_tensor_value_info
STAYS = [helper.make_node("Identity", ["going"], ["stays"])]
ENDS = [
    helper.make_node("ReduceSum", ["v"], ["total"], keepdims=0),
    helper.make_node("Less", ["total", "most"], ["stays"]),
]
ADDED = [helper.make_node("Add", ["v", "one"], ["w"])]
DOUBLED = [helper.make_node("Concat", ["v", "v"], ["w"], axis=0)]
APPENDED = [helper.make_node("Concat", ["v", "row"], ["w"], axis=0)]


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), **attributes)


def body(work: list[onnx.NodeProto], condition: list[onnx.NodeProto] = STAYS, more: str = ""):
    """Return the body of a Loop that carries v; `more` names values that it collects."""
    return helper.make_graph(
        [*condition, *work], "body",
        [value("i", INT, []), value("going", BOOL, []), value("v", FLOAT, None)],
        [value("stays", BOOL, []), value("w", FLOAT, None)]
        + [value(name, FLOAT, None) for name in more.split()],
    )  # fmt: skip


def model(nodes: list[onnx.NodeProto], shape=(4,), **stored: Any) -> onnx.ModelProto:
    """Return a graph of x, with constants: `yes`, `one`, `most` and those given."""
    constants = {
        "yes": np.array(True), "one": np.ones(1, np.float32), "most": np.float32(9), **stored
    }  # fmt: skip
    held = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(
        nodes, "g", [value("x", FLOAT, list(shape))], [value("y", FLOAT, None)], held
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def loop(trips: str, work: list[onnx.NodeProto], condition=STAYS, **stored: Any):
    outer = node("Loop", f"{trips} yes x", "y", body=body(work, condition))
    return model([outer], **stored)


def always() -> list[onnx.NodeProto]:
    true = helper.make_tensor("t", BOOL, [], [True])
    return [node("Constant", "", "true", value=true), node("Or", "going true", "stays")]


def nested(trips: int, levels: int) -> onnx.ModelProto:
    work = ADDED
    for _ in range(levels - 1):
        work = [node("Loop", "n yes v", "w", body=body(work))]
    return loop("n", work, n=np.int64(trips))


def in_a_branch(trips: str, **stored: Any) -> onnx.ModelProto:
    chosen = helper.make_graph(
        [node("Loop", f"{trips} yes x", "z", body=body(ADDED))], "b", [], [value("z", FLOAT, None)]
    )
    tests = [node("ReduceSum", "x", "s", keepdims=0), node("Less", "s most", "c")]
    both = node("If", "c", "y", then_branch=chosen, else_branch=chosen)
    return model([*tests, both], **stored)


def scan(length: int, size: int = 1) -> onnx.ModelProto:
    inner = helper.make_graph(
        [node("Add", "s e", "s2"), node("Identity", "s2", "o")], "scan",
        [value("s", FLOAT, [size]), value("e", FLOAT, [size])],
        [value("s2", FLOAT, [size]), value("o", FLOAT, [size])],
    )  # fmt: skip
    nodes = [
        node("ConstantOfShape", "n", "rows"),
        node("Scan", "x rows", "y all", body=inner, num_scan_inputs=1),
    ]
    return model(nodes, (size,), n=np.array([length, size]))


def collecting(trips: int) -> onnx.ModelProto:
    work = [*ADDED, node("Identity", "w", "kept")]
    outer = node("Loop", "n yes x", "last y", body=body(work, more="kept"))
    return model([outer], (1000,), n=np.int64(trips))


def product(trips: int) -> onnx.ModelProto:
    work = [node("MatMul", "v table", "w")]
    outer = node("Loop", "n yes x", "y", body=body(work))
    return model([outer], (256, 256), n=np.int64(trips), table=np.ones((256, 256), np.float32))


def appending(trips: int) -> onnx.ModelProto:
    return loop("n", APPENDED, n=np.int64(trips), row=np.ones(1 << 16, np.float32))


SMALL_AND_HUGE: dict[str, tuple[onnx.ModelProto, Callable[[], onnx.ModelProto], str]] = {
    "no number": (
        loop("n", ADDED, n=np.int64(100)), lambda: loop("-", ADDED), "Loop -> y: the loop never end"
    ),
    "always true": (
        loop("n", ADDED, always(), n=np.int64(100)), lambda: loop("-", ADDED, always()),
        "Loop -> y: the loop never ends",
    ),
    "a large number": (
        loop("n", ADDED, n=np.int64(10**5)), lambda: loop("n", ADDED, n=np.int64(1 << 62)),
        r"Loop -> y: the file holds 3 nodes, and its loops run at least 9.22e\+18 of them",
    ),
    "loops in loops": (
        nested(10, 4), lambda: nested(10_000, 4), r"Loop -> w: the file holds .* at least 2e\+08"
    ),
    "in a branch": (
        in_a_branch("n", n=np.int64(10)), lambda: in_a_branch("-"), "Loop -> z: the loop never ends"
    ),
    "doubled": (
        loop("n", DOUBLED, n=np.int64(5)), lambda: loop("n", DOUBLED, n=np.int64(50)),
        "Loop -> y: after 2[0-9] rounds it holds at least 512 MiB, at most 256 MiB are taken for",
    ),
    "appended": (
        appending(500), lambda: appending(50_000), "Loop -> y: after 50000 rounds .* 12500 MiB"
    ),
    "collected": (
        collecting(1000), lambda: collecting(10**5), "Loop -> last, y: after 100000 .* 381 MiB"
    ),
    "scanned": (
        scan(1000), lambda: scan(10**7), r"Scan -> y, all: the file holds 4 nodes, .* least 2e\+07"
    ),
    "multiplied": (
        product(100), lambda: product(10_000), r"Loop -> y: a run takes at least 1.68e\+11 mult"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_AND_HUGE)
def test_a_loop_out_of_proportion_is_refused_and_a_small_one_is_not(name) -> None:
    small, huge, words = SMALL_AND_HUGE[name]
    check_loops(PLACE, small, 1000)
    with pytest.raises(VerificationError, match=words):
        check_loops(PLACE, huge(), 1000)


@pytest.mark.parametrize("trips", ["-", "n"])
def test_a_loop_that_its_data_end_is_for_the_run_to_judge(trips) -> None:
    """Exported while loops have the largest number there is, and a condition."""
    check_loops(PLACE, loop(trips, ADDED, ENDS, n=np.int64((1 << 63) - 1)), 1000)


def test_a_loop_that_never_begins_is_none() -> None:
    check_loops(PLACE, loop("-", ADDED, yes=np.array(False)), 1000)


def test_a_loop_as_long_as_an_input_is_taken() -> None:
    nodes = [node("Size", "x", "n"), node("Loop", "n yes x", "y", body=body(DOUBLED))]
    check_loops(PLACE, model(nodes), 1000)


def test_a_branch_that_a_constant_excludes_does_not_count() -> None:
    endless = helper.make_graph(
        [node("Loop", "- yes x", "z", body=body(ADDED))], "b", [], [value("z", FLOAT, None)]
    )
    fine = helper.make_graph([node("Abs", "x", "z")], "b", [], [value("z", FLOAT, None)])
    check_loops(PLACE, model([node("If", "yes", "y", then_branch=fine, else_branch=endless)]), 9)
    with pytest.raises(VerificationError, match="Loop -> z: the loop never ends"):
        check_loops(
            PLACE, model([node("If", "yes", "y", then_branch=endless, else_branch=fine)]), 9
        )


def test_a_larger_file_may_carry_more() -> None:
    check_loops(PLACE, collecting(10**5), 100 << 20)


def test_following_loops_is_bounded(monkeypatch) -> None:
    """What is not followed is not counted, and costs nothing."""
    monkeypatch.setattr(loops, "MOST_INFERRED", 20)
    check_loops(PLACE, loop("n", DOUBLED, n=np.int64(50)), 1000)
