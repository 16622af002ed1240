"""A proxy turns into a number where the number is known, and refuses what would be lost."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.fx.proxy import TraceError

from rewrite.tracing.proxies import (
    AUGMENTED,
    ValueAttribute,
    ValueProxy,
    nodes_of,
    proxies_in,
)
from rewrite.tracing.value_tracer import ValueTracer


class Knows(ValueTracer):
    """Says 3 of every value."""

    def __init__(self) -> None:
        super().__init__(None)
        self.graph = Graph()

    def number(self, obj: Any) -> Any:
        return 3

    def length(self, obj: Any) -> int:
        return 3


def proxy() -> ValueProxy:
    tracer = Knows()
    made = tracer.proxy(tracer.graph.placeholder("x"))
    assert isinstance(made, ValueProxy)
    return made


def test_a_known_value_is_a_number_wherever_python_asks_for_one() -> None:
    x = proxy()
    assert int(x) == 3 and float(x) == 3.0 and operator.index(x) == 3 and len(x) == 3
    assert isinstance(float(x), float) and ["a", "b", "c", "d"][x] == "d"


def test_an_attribute_makes_a_node_only_when_it_is_used() -> None:
    x = proxy()
    attribute = x.shape
    assert isinstance(attribute, ValueAttribute) and len(x.node.graph.nodes) == 1
    assert list(nodes_of(attribute)) == []
    node = attribute.node
    assert node.target is getattr and list(nodes_of(attribute)) == [node]


def test_a_method_is_one_call_and_leaves_no_attribute() -> None:
    x = proxy()
    x.relu()
    assert [(n.op, n.target) for n in x.node.graph.nodes][1:] == [("call_method", "relu")]


@pytest.mark.parametrize("name", ["data", "grad", "requires_grad"])
def test_an_assignment_that_a_graph_would_lose_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=rf"assigns \.{name} of a tensor"):
        setattr(proxy(), name, 1)


def test_an_item_assignment_is_recorded_with_its_key() -> None:
    x = proxy()
    x[1:, None] = 2.0
    (node,) = [n for n in x.node.graph.nodes if n.op == "call_function"]
    assert node.target is operator.setitem
    assert node.args == (x.node, (slice(1, None, None), None), 2.0)


def test_nodes_are_found_in_containers_up_to_a_depth() -> None:
    x, y = proxy(), proxy()
    found = list(nodes_of({"a": [x, (y, 1)], "b": torch.ones(1)}))
    assert found == [x.node, y.node] and all(isinstance(node, Node) for node in found)
    deep: Any = x
    for _ in range(4):
        deep = [deep]
    assert list(proxies_in(deep)) == [x] and list(proxies_in([deep])) == []


@pytest.mark.parametrize("name", AUGMENTED)
def test_an_operator_in_place_is_recorded_however_it_is_spelled(name: str) -> None:
    spelled = name.strip("_")
    x = proxy()
    getattr(operator, spelled)(x, 2)
    getattr(x, name)(2)
    nodes = [n for n in x.node.graph.nodes if n.op == "call_method"]
    assert [(node.target, node.args) for node in nodes] == [(name, (x.node, 2))] * 2


def test_the_operators_in_place_are_those_that_a_tensor_has() -> None:
    spelled = {f"__i{name.strip('_')}__" for name in dir(operator) if name.startswith("__")}
    assert {name for name in spelled if hasattr(torch.Tensor, name)} == AUGMENTED.keys()
    x = proxy()
    x @= 2  # another value: nothing is written
    assert x.node.target is operator.matmul
