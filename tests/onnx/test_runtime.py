"""Sessions of onnxruntime: what only a run tells is bounded, and honest loops have their time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rewrite.errors import VerificationError
from rewrite.onnx.file import open_onnx
from rewrite.onnx.runtime import run, session, trial
from rewrite.onnx.verify import verify_onnx
from tests.onnx.test_feeds import make, saved

value = helper.make_tensor_value_info


def looping(tmp_path, still: str):
    """Return a loop that goes on while it may, or while its number is small."""
    body = helper.make_graph(
        [
            make("Add", ["carried", "carried"], ["doubled"]),
            make("ReduceMax", ["doubled"], ["largest"], keepdims=0),
            make("Less", ["largest", "limit"], ["small"]),
            make("LessOrEqual", ["largest", "largest"], ["always"]),
            make("Identity", [still], ["still"]),
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
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.float32(1000), "limit"),
    ]
    path = saved(
        tmp_path, [make("Loop", ["", "yes", "x"], ["y"], body=body)], {"x": [4]}, {"y": [4]},
        stored,
    )  # fmt: skip
    return open_onnx(path)


def test_a_loop_that_never_ends_is_stopped(tmp_path):
    live = session(looping(tmp_path, "always"))
    with pytest.raises(VerificationError, match="did not end within 1 s and was stopped"):
        run(live, {"x": np.ones(4, np.float32)})


def test_a_loop_that_its_data_end_is_run(tmp_path):
    (got,) = run(session(looping(tmp_path, "small")), {"x": np.ones(4, np.float32)})
    assert got.tolist() == [1024] * 4


def test_a_graph_with_a_loop_may_take_what_it_and_its_inputs_are_worth(tmp_path):
    live = session(looping(tmp_path, "small"))
    assert 1 < live.seconds({}) < 1.1
    assert live.seconds({"x": np.ones(1_000_000, np.float32)}) - live.seconds({}) == 40
    assert live.memory({"x": np.ones(1000, np.float32)}) == (128 << 20) + 128 * (live.nbytes + 4000)


def filled(tmp_path, nodes):
    """Return a graph that fills a value of the size n with ones."""
    stored = [
        numpy_helper.from_array(np.array([0]), "zero"),
        numpy_helper.from_array(np.array([1 << 29]), "more"),
    ]
    ones = make("ConstantOfShape", ["n"], ["ones"])
    path = saved(
        tmp_path, [*nodes, ones, make("ReduceSum", ["ones"], ["y"])], {"x": [1]}, {"y": [1]}, stored
    )
    return open_onnx(path)


def test_a_size_that_an_input_holds_is_bounded(tmp_path):
    """Two gigabytes of a file of 300 bytes, of which nothing can be known before it runs."""
    nodes = [make("Cast", ["x"], ["i"], to=TensorProto.INT64), make("Mul", ["i", "more"], ["n"])]
    live = session(filled(tmp_path, nodes))
    assert live.has_open_sizes
    with pytest.raises(VerificationError, match=r"^the graph (took|asked for too much memory)"):
        run(live, {"x": np.ones(1, np.float32)})


def test_a_size_that_an_input_holds_may_be_small(tmp_path):
    nodes = [make("Cast", ["x"], ["n"], to=TensorProto.INT64)]
    (got,) = run(session(filled(tmp_path, nodes)), {"x": np.full(1, 1000, np.float32)})
    assert got.tolist() == [0]


def test_a_graph_without_loops_may_take_its_time(tmp_path):
    path = saved(tmp_path, [make("Relu", ["x"], ["y"])], {"x": [4]}, {"y": [4]})
    live = session(open_onnx(path))
    assert live.seconds({}) == 600
    assert live.memory({}) is None
    (got,) = run(live, {"x": np.ones(4, np.float32)}, seconds=5)
    assert got.tolist() == [1, 1, 1, 1]


ASKED = [make("Cast", ["x"], ["i"], to=TensorProto.INT64), make("Add", ["i", "more"], ["n"])]


def test_a_trial_stops_what_does_not_end(tmp_path):
    with pytest.raises(VerificationError, match="did not end within 1 s and was stopped"):
        trial(looping(tmp_path, "always"))


def test_a_trial_stops_what_asks_for_too_much(tmp_path):
    with pytest.raises(VerificationError, match="memory"):
        trial(filled(tmp_path, ASKED))


def test_a_trial_takes_the_shapes_that_were_given(tmp_path):
    source = looping(tmp_path, "small")
    trial(source, [[4]])
    with pytest.raises(VerificationError, match="input x is 4, not 2x2"):
        trial(source, [[2, 2]])


def decoded(tmp_path, length: int):
    """Return a graph as exporters write greedy decoding: until data say so, within `length`."""
    body = helper.make_graph(
        [
            make("MatMul", ["state", "table"], ["next"]),
            make("ReduceMax", ["next"], ["best"], keepdims=0),
            make("Less", ["best", "enough"], ["still"]),
            make("Identity", ["next"], ["token"]),
        ],
        "body",
        [
            value("step", TensorProto.INT64, []), value("going", TensorProto.BOOL, []),
            value("state", TensorProto.FLOAT, [1, 64]),
        ],
        [
            value("still", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [1, 64]),
            value("token", TensorProto.FLOAT, [1, 64]),
        ],
    )  # fmt: skip
    stored = [
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.array(length), "length"),
        numpy_helper.from_array(np.float32(1e30), "enough"),
        numpy_helper.from_array(1.01 * np.eye(64, dtype=np.float32), "table"),
    ]
    loop = make("Loop", ["length", "yes", "x"], ["last", "y"], body=body)
    return saved(tmp_path, [loop], {"x": [1, 64]}, {"y": [None, 1, 64]}, stored)


@pytest.mark.parametrize("length", [500, (1 << 63) - 1])
def test_greedy_decoding_is_tried_and_verified(tmp_path, length):
    """The largest number there is stands for none: 7,000 steps, until one exceeds a limit."""
    path = decoded(tmp_path, length)
    trial(open_onnx(path))
    assert verify_onnx(path).ok


@pytest.mark.parametrize("steps", [5, 400])
def test_a_recurrent_network_that_was_scripted_is_tried(tmp_path, steps):
    """Its loop is as long as its input is, which the file does not say."""

    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.new, self.old = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)

        def forward(self, x):
            state = torch.zeros(x.shape[1], 6)
            for step in range(x.shape[0]):
                state = torch.tanh(self.new(x[step]) + self.old(state))
            return state

    torch.manual_seed(0)
    path = tmp_path / "rnn.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.script(Scripted().eval())
        torch.onnx.export(
            net, (torch.randn(3, 2, 4),), path, input_names=["x"], dynamo=False,
            dynamic_axes={"x": {0: "time", 1: "batch"}},
        )  # fmt: skip
    opened = open_onnx(path)
    assert "Loop" in opened.operator_counts
    trial(opened, [[steps, 2, 4]])
    assert verify_onnx(path, example_inputs=(torch.randn(steps, 2, 4),)).ok


def test_sizes_that_come_of_shapes_are_not_open(tmp_path):
    """Positions as exporters write them: as many as the input is long."""
    nodes = [
        make("Shape", ["x"], ["shape"]), make("Squeeze", ["shape"], ["n"]),
        make("Cast", ["n"], ["end"], to=TensorProto.FLOAT),
        make("Range", ["none", "end", "step"], ["places"]), make("Add", ["x", "places"], ["y"]),
    ]  # fmt: skip
    stored = [
        numpy_helper.from_array(np.float32(0), "none"),
        numpy_helper.from_array(np.float32(1), "step"),
    ]
    path = saved(tmp_path, nodes, {"x": [None]}, {"y": [None]}, stored)
    assert not session(open_onnx(path)).has_open_sizes
