from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from rewrite.functional.forms import functional, written


def _before_and_after(node: Node) -> tuple[GraphModule, GraphModule]:
    """Return a graph whose `node` writes in place, and the same with its functional form."""
    graph = node.graph
    before = GraphModule(nn.Module(), graph)
    copied = Graph()
    places: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph, places))
    line = places[node]
    operand = written(line)
    make = functional(line)
    assert operand is not None and not isinstance(make, str)
    order = {n: i for i, n in enumerate(copied.nodes)}
    later = [user for user in operand.users if order[user] > order[line]]
    with copied.inserting_before(line):
        new = make(copied, line)
    line.replace_all_uses_with(new)
    for user in later:
        user.replace_input_with(operand, new)
    copied.erase_node(line)
    return before, GraphModule(nn.Module(), copied)


def _graph() -> tuple[Graph, Node, Node]:
    graph = Graph()
    x = graph.placeholder("x")
    return graph, x, graph.call_function(torch.mul, (x, 2.0))


def _check(graph: Graph, node: Node, y: Node) -> str:
    graph.output(graph.call_function(torch.add, (y, 1.0)))
    before, after = _before_and_after(node)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    old, new = before(x), after(x)
    assert torch.equal(old, new) and not torch.equal(old, 2 * x + 1)
    if not old.requires_grad:
        assert not new.requires_grad
        return after.code
    gradients = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0]
                 for out in (old, new)]  # fmt: skip
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
    return after.code


@pytest.mark.parametrize("value", [7.0, "mean"])
@pytest.mark.parametrize(
    "key",
    [0, -1, slice(1, 3), slice(-2, None), (slice(None), 2), (slice(0, 2), slice(None, None, 2)),
     (1, slice(1, None)), (0, Ellipsis), Ellipsis, "mask", (Ellipsis, 2),
     (Ellipsis, 1, slice(0, 3)), (Ellipsis, slice(1, 4, 2)), (1, Ellipsis, -1),
     (slice(None), [0, 3]),
     [2, 0], "places",
     (Ellipsis, "places"), ("places", slice(1, 3))],
)  # fmt: skip
def test_index_assignments(key: object, value: object) -> None:
    graph, x, y = _graph()
    given = graph.call_function(torch.mean, (x,)) if value == "mean" else value
    index = graph.call_function(torch.gt, (x, 0.0)) if key == "mask" else key
    if "places" in (key if isinstance(key, tuple) else (key,)):
        places = graph.call_function(torch.arange, (0, 4, 2))
        places.meta["val"] = torch.arange(0, 4, 2)
        several = tuple(places if k == "places" else k for k in key)  # type: ignore[attr-defined]
        index = several if isinstance(key, tuple) else places
    node = graph.call_function(operator.setitem, (y, index, given))
    assert "setitem" not in _check(graph, node, y)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (torch.clamp_, (-0.5, 0.5), {}),
        (torch.relu_, (), {}),
        (F.elu_, (), {}),
        (F.leaky_relu, (0.2, True), {}),
        (F.hardtanh, (-0.1, 0.1), {"inplace": True}),
        (operator.iadd, (3.0,), {}),
        (operator.itruediv, (3.0,), {}),
        ("sub_", (1.5,), {"alpha": 2}),
        ("zero_", (), {}),
        ("fill_", (3.0,), {}),
        ("copy_", ("mean",), {}),
        (torch.ops.aten.add_.Tensor, ("mean",), {}),
        (torch.ops.aten.relu_.default, (), {}),
    ],
)
def test_spellings(target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    graph, x, y = _graph()
    given = tuple(graph.call_function(torch.mean, (x,)) if a == "mean" else a for a in args)
    op = "call_method" if isinstance(target, str) else "call_function"
    _check(graph, graph.create_node(op, target, (y, *given), kwargs), y)


def test_out() -> None:
    graph, x, y = _graph()
    node = graph.call_function(torch.mul, (x, x), {"out": y})
    assert written(node) is y
    assert "out" not in _before_and_after(graph.output(node) and node)[1].code


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        ("normal_", (), "draws random numbers"),
        ("resize_", (3,), "changes the tensor itself"),
        ("frobnicate_", (), "no form that returns a new tensor"),
        (operator.setitem, ((None, 0), 1.0), "new axes"),
        (operator.setitem, ((True, 0), 1.0), "new axes"),
        (operator.setitem, (([0, 1], 0), 1.0), "several places along more than one axis"),
    ],
)
def test_what_has_no_functional_form(target: object, args: tuple[object, ...], reason: str) -> None:
    graph, _, y = _graph()
    op = "call_method" if isinstance(target, str) else "call_function"
    found = functional(graph.create_node(op, target, (y, *args)))
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize("name", ["relu", "__add__", "requires_grad_"])
def test_what_writes_nothing(name: str) -> None:
    graph, _, y = _graph()
    assert written(graph.call_method(name, (y,))) is None
    assert isinstance(y, Node) and isinstance(torch.zeros(1), Tensor)
