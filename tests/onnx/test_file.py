"""An ONNX file from any source: read whole, or refused in one clear line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewrite.equivalence.verification import Level
from rewrite.errors import VerificationError
from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    BAD,
    X,
    external,
)


def test_external_data_is_read(tmp_path, net):
    assert verify_onnx(external(tmp_path, net), net, X, level=Level.QUICK).ok


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_file_is_one_clear_line(tmp_path, net, make):
    path = make(tmp_path, net)
    with pytest.raises(VerificationError, match=BAD[make]) as error:
        verify_onnx(path, net, X)
    assert "\n" not in str(error.value)


def _nested(place: str, constant: onnx.TensorProto) -> onnx.ModelProto:
    """Return y = x * constant, the constant in a loop's body, in a branch or in a function."""
    value, kind = helper.make_tensor_value_info, TensorProto
    going = value("going", kind.BOOL, [])
    held = helper.make_node("Constant", [], ["two"], value=constant)
    product = helper.make_node("Mul", ["v", "two"], ["w"])
    x, y = value("x", kind.FLOAT, [2]), value("y", kind.FLOAT, [2])
    given, functions = [numpy_helper.from_array(np.array(True), "go")], []
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    if place == "loop":
        body = helper.make_graph(
            [helper.make_node("Identity", ["going"], ["goes"]), product], "body",
            [value("i", kind.INT64, []), going, value("v", kind.FLOAT, [2])],
            [value("goes", kind.BOOL, []), value("w", kind.FLOAT, [2])], [constant],
        )  # fmt: skip
        given.append(numpy_helper.from_array(np.array(1), "trips"))
        node = helper.make_node("Loop", ["trips", "go", "x"], ["y"], body=body)
    elif place == "branch":
        product.input[0] = "x"
        then = helper.make_graph([held, product], "then", [], [value("w", kind.FLOAT, [2])])
        node = helper.make_node("If", ["go"], ["y"], then_branch=then, else_branch=then)
    else:
        functions = [helper.make_function("own", "Twice", ["v"], ["w"], [held, product], opsets)]
        given, node = [], helper.make_node("Twice", ["x"], ["y"], domain="own")
    graph = helper.make_graph([node], "g", [x], [y], given)
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    model.ir_version = 10
    return model


PLACES = ("loop", "branch", "function")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("field", ["float_data", "raw_data", "dims"])
def test_the_data_of_a_tensor_within_is_held_to_its_shape(tmp_path, place, field):
    constant = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    if field == "raw_data":
        constant = numpy_helper.from_array(np.array(2.0, np.float32), "two")
    path = tmp_path / "m.onnx"
    onnx.save(_nested(place, constant), path)
    assert verify_onnx(path, level=Level.QUICK).ok
    if field == "dims":
        constant.dims.append(2)
    else:
        constant.ClearField(field)
    onnx.save(_nested(place, constant), path)
    with pytest.raises(VerificationError, match="two: its data does not fit its shape"):
        verify_onnx(path, level=Level.QUICK)


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_within_reads_no_file_outside_of_the_folder(tmp_path, place):
    constant = TensorProto(name="two", data_type=TensorProto.FLOAT, dims=[1])
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="two.data")
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "m.onnx"
    path.write_bytes(_nested(place, constant).SerializeToString())
    for folder in (tmp_path, tmp_path / "inner"):
        np.full(1, 2.0, np.float32).tofile(folder / "two.data")
    assert verify_onnx(path, level=Level.QUICK).ok
    constant.external_data[0].value = "../two.data"
    path.write_bytes(_nested(place, constant).SerializeToString())
    with pytest.raises(VerificationError, match="outside"):
        verify_onnx(path, level=Level.QUICK)
