"""What building a graph would compute, and how large its values are, known before it is built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewrite.errors import VerificationError
from rewrite.onnx.file import open_onnx
from rewrite.onnx.vetting.sizes import check_static

node = helper.make_node
value = helper.make_tensor_value_info


def given(name: str, content: object, kind: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(content, kind), name)


def graph(nodes, *constants, sparse=(), opset=18) -> onnx.ModelProto:
    """Return a graph that adds what the nodes make of constants, `s`, to its input."""
    body = helper.make_graph(
        [*nodes, node("ReduceSum", ["s"], ["r"], keepdims=0), node("Mul", ["x", "r"], ["y"])],
        "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])],
        list(constants), sparse_initializer=list(sparse),
    )  # fmt: skip
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def fill(size: str, made: str) -> onnx.NodeProto:
    return node("ConstantOfShape", [size], [made])


def table(n: int) -> onnx.ModelProto:
    return graph([fill("n", "e"), node("MatMul", ["e", "e"], ["s"])], given("n", [n, n]))


def computed(n: int) -> onnx.ModelProto:
    """Return a graph whose constant has a size that no shape inference knows: a b a / a."""
    nodes = [
        node("Mul", ["a", "b"], ["m"]),
        node("Concat", ["m", "a"], ["both"], axis=0),
        node("ReduceProd", ["both"], ["p"], keepdims=1),
        node("Div", ["p", "a"], ["n"]),
        fill("n", "s"),
    ]
    return graph(nodes, given("a", [n]), given("b", [n]))


def in_a_branch(n: int) -> onnx.ModelProto:
    branch = helper.make_graph(
        [fill("n", "e")], "b", [], [value("e", TensorProto.FLOAT, None)], [given("n", [n])]
    )
    nodes = [node("If", ["c"], ["s"], then_branch=branch, else_branch=branch)]
    return graph(nodes, given("c", True, np.bool_))


def in_a_function(n: int) -> onnx.ModelProto:
    made = graph([node("F", ["n"], ["s"], domain="d")], given("n", [n]))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
    made.functions.append(helper.make_function("d", "F", ["n"], ["e"], [fill("n", "e")], opsets))
    made.opset_import.append(opsets[1])
    return made


def sparse(n: int) -> onnx.ModelProto:
    one = helper.make_sparse_tensor(given("w", [1.0], np.float32), given("i", [[0, 0]]), [n, n])
    return graph([node("Identity", ["w"], ["s"])], sparse=[one])


def sparse_constant(n: int) -> onnx.ModelProto:
    one = helper.make_sparse_tensor(given("v", [1.0], np.float32), given("i", [[0, 0]]), [n, n])
    return graph([node("Constant", [], ["s"], sparse_value=one)])


def outer_product(n: int) -> onnx.ModelProto:
    row = given("w", np.ones((n, 1)), np.float32)
    return graph([node("Transpose", ["w"], ["t"]), node("MatMul", ["w", "t"], ["s"])], row)


def einsum(n: int) -> onnx.ModelProto:
    nodes = [fill("n", "e"), node("Einsum", ["e", "e"], ["s"], equation="ab,bc->ac")]
    return graph(nodes, given("n", [n, n]))


def convolution(n: int) -> onnx.ModelProto:
    nodes = [
        fill("n", "e"), fill("k", "w"), node("Conv", ["e", "w"], ["s"], pads=[100] * 4)
    ]  # fmt: skip
    return graph(nodes, given("n", [1, 8, n, n]), given("k", [8, 8, 101, 101]))


def axes(count: int) -> onnx.ModelProto:
    nodes = [node("Gather", [f"v{i}"] * 2, [f"v{i + 1}"]) for i in range(count)]
    nodes += [node("Cast", [f"v{count}"], ["s"], to=TensorProto.FLOAT)]
    return graph(nodes, given("v0", [[0]]))


def texts(count: int) -> onnx.ModelProto:
    nodes = [node("StringConcat", [f"v{i}"] * 2, [f"v{i + 1}"]) for i in range(count)]
    nodes += [node("Equal", [f"v{count}", "v0"], ["q"])]
    nodes += [node("Cast", ["q"], ["s"], to=TensorProto.FLOAT)]
    text = numpy_helper.from_array(np.array(["a"], object), "v0")
    return graph(nodes, text, opset=20)


SMALL_AND_HUGE = {
    table: (100, 20_000, r"MatMul -> f?s: .* become 1\d{3} MiB when it is built|ConstantOfShape"),
    computed: (100, 1 << 20, "value s of 1099511627776 would take 4096 GiB"),
    in_a_branch: (100, 1 << 40, "value s of 1099511627776 would take 4096 GiB"),
    in_a_function: (100, 1 << 40, "would take 4096 GiB"),
    sparse: (100, 1 << 20, "w: the file has .* its constants become 4194304 MiB"),
    sparse_constant: (100, 1 << 20, "Constant -> s: .* become 4194304 MiB"),
    outer_product: (100, 40_000, "MatMul -> s: .* become 6104 MiB|would take 6 GiB"),
    einsum: (100, 5_000, r"Einsum -> s: .* at least 1.25e\+11 multiplications of constants"),
    convolution: (2, 300, "Conv -> s: .* multiplications of constants"),
    axes: (2, 40, "Gather -> v6: its value may have 65 axes, at most 64"),
    texts: (2, 80, "StringConcat -> v65: 65 texts in a row"),
}


@pytest.mark.parametrize("make", SMALL_AND_HUGE, ids=lambda make: make.__name__)
def test_a_file_of_few_bytes_does_not_become_gigabytes(tmp_path, make) -> None:
    small, huge, words = SMALL_AND_HUGE[make]
    path = tmp_path / "net.onnx"
    onnx.save(make(huge), path)
    with pytest.raises(VerificationError, match=words):
        open_onnx(path)
    onnx.save(make(small), path)
    assert open_onnx(path).inputs[0].name == "x"


def test_constants_may_be_as_large_as_the_file_is(monkeypatch) -> None:
    """A mask of 4 MiB is out of proportion to 200 bytes, and nothing to a file of 2 MiB."""
    monkeypatch.setattr("rewrite.onnx.vetting.sizes.MOST_CONSTANT_BYTES", 1 << 20)
    mask = table(1024)
    check_static(Path("net.onnx"), mask, 2 << 20)
    with pytest.raises(VerificationError, match="ConstantOfShape -> e: the file has 200 bytes"):
        check_static(Path("net.onnx"), mask, 200)


@pytest.mark.parametrize("name", ["light_vgg19", "light_zfnet512", "light_densenet121"])
def test_weights_that_a_node_fills_in_are_taken(name) -> None:
    """ONNX's own test models: 9 kB that become 548 MiB of weights."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    if not (folder / f"{name}.onnx").exists():
        pytest.skip("this onnx comes without them")
    assert open_onnx(folder / f"{name}.onnx").inputs


def test_random_numbers_and_what_depends_on_an_input_are_no_constants() -> None:
    """A product of an input costs its run, whose deadline is another matter."""
    nodes = [
        fill("n", "e"), node("Mul", ["e", "x"], ["d"]), node("MatMul", ["d", "d"], ["s"])
    ]  # fmt: skip
    check_static(Path("net.onnx"), graph(nodes, given("n", [6_000, 6_000])), 200)
    nodes = [node("RandomNormal", [], ["e"], shape=[6_000] * 2), node("MatMul", ["e"] * 2, ["s"])]
    check_static(Path("net.onnx"), graph(nodes), 200)


def test_many_lookups_in_a_row_are_no_growth_of_axes(tmp_path) -> None:
    # An unfolding of an image is as long a chain: lookups by rows, and a reshape behind each.
    rows = numpy_helper.from_array(np.array([[0, 0]]), "rows")
    flat = numpy_helper.from_array(np.array([1, 2]), "flat")
    nodes = []
    for i in range(80):
        nodes.append(node("Gather", [f"v{i}", "rows"], [f"g{i}"], axis=1))
        nodes.append(node("Reshape", [f"g{i}", "flat"], [f"v{i + 1}"]))
    nodes.append(node("Cast", ["v80"], ["s"], to=TensorProto.FLOAT))
    onnx.save(graph(nodes, given("v0", [[0, 0]]), rows, flat), path := tmp_path / "net.onnx")
    assert open_onnx(path).inputs[0].name == "x"
