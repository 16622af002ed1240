"""Sessions of onnxruntime: a loop that never ends is stopped, and time is left where none loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewrite.errors import VerificationError
from rewrite.onnx.file import open_onnx
from rewrite.onnx.runtime import run, session
from tests.onnx.test_feeds import make, saved


def test_a_loop_that_never_ends_is_stopped(tmp_path):
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            make("Identity", ["going"], ["still"]),
            make("Add", ["carried", "carried"], ["doubled"]),
        ],
        "body",
        [
            value("step", TensorProto.INT64, []),
            value("going", TensorProto.BOOL, []),
            value("carried", TensorProto.FLOAT, [4]),
        ],
        [value("still", TensorProto.BOOL, []), value("doubled", TensorProto.FLOAT, [4])],
    )
    stored = [
        numpy_helper.from_array(np.array(1 << 60), "trips"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    path = saved(
        tmp_path, [make("Loop", ["trips", "yes", "x"], ["y"], body=body)], {"x": [4]}, {"y": [4]},
        stored,
    )  # fmt: skip
    live = session(open_onnx(path))
    assert 30 <= live.seconds < 31
    short = replace(live, seconds=1)
    with pytest.raises(VerificationError, match="did not end within 1 s and was stopped"):
        run(short, {"x": np.ones(4, np.float32)})


def test_a_graph_without_loops_may_take_its_time(tmp_path):
    path = saved(tmp_path, [make("Relu", ["x"], ["y"])], {"x": [4]}, {"y": [4]})
    live = session(open_onnx(path))
    assert live.seconds == 600
    (got,) = run(live, {"x": np.ones(4, np.float32)}, seconds=5)
    assert got.tolist() == [1, 1, 1, 1]
