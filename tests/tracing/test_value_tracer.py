"""Numbers, lengths and items of proxies that are known; each answer is a decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite.runtime.inputs import Inputs
from rewrite.runtime.tree import Tree
from rewrite.tracing.regions import Region, trace_regions

X = torch.randn(2, 3, 4)


class Layer(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.step = forward

    def forward(self, x: Tensor) -> Any:
        return self.step(x)


def traced(forward: Callable[[Tensor], Any], x: Tensor | None = X) -> tuple[Region | None, str]:
    inputs = None if x is None else Inputs.of(x)
    traced = trace_regions(Tree(Layer(forward)), inputs)
    regions, opaque = traced.regions, traced.opaque
    return (regions[0] if regions else None), (opaque[""].reason if opaque else "")


def targets(region: Region | None) -> list[Any]:
    assert region is not None
    return [n.target for n in region.graph.nodes if n.op not in ("placeholder", "output")]


def adds_rows(x: Tensor) -> Any:
    out: Any = 0
    for row in x:
        out = out + row
    return out


def by_size(x: Tensor) -> Tensor:
    return x.relu() if x.shape[1] > 2 else x.tanh()


def by_value(x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 2 else x.tanh()


def repeats(x: Tensor) -> Tensor:
    for _ in range(x.shape[0]):
        x = x.relu()
    return x


def adds_parts(x: Tensor) -> Any:
    out: Any = 0
    for part in x.split([1, 3], dim=2):
        out = out + part.sum()
    return out


def adds_chunks(x: Tensor) -> Any:
    out: Any = 0
    for part in x.chunk(2, dim=2):
        out = out + part
    return out


def by_axes(x: Tensor) -> Tensor:
    return x.relu() if len(x.shape) == 3 else x.tanh()


def test_a_branch_on_a_size_takes_the_way_of_the_example() -> None:
    region, _ = traced(by_size)
    assert "relu" in targets(region) and "tanh" not in targets(region)
    region, _ = traced(by_size, torch.randn(2, 2, 4))
    assert "tanh" in targets(region) and "relu" not in targets(region)


def test_a_branch_on_a_size_is_noted_and_names_its_line() -> None:
    region, _ = traced(by_size)
    assert region is not None
    (decision,) = region.decisions
    assert decision.code is by_size.__code__
    assert decision.line == by_size.__code__.co_firstlineno + 1
    assert [node.name for node in decision.held["x"]] == ["x"]
    assert {n.target for n in decision.nodes} >= {"x", "relu"}, "and what it made since"


def test_without_inputs_a_branch_on_a_size_ends_the_trace() -> None:
    region, reason = traced(by_size, None)
    assert region is None and reason.startswith("TraceError")


def test_a_branch_on_a_value_ends_the_trace_with_inputs_too() -> None:
    region, reason = traced(by_value)
    assert region is None and reason.startswith("TraceError")


def test_a_loop_over_a_size_is_unrolled_as_often_as_the_example_says() -> None:
    region, _ = traced(repeats)
    assert targets(region).count("relu") == 2
    region, _ = traced(repeats, torch.randn(5, 1))
    assert targets(region).count("relu") == 5


def test_a_loop_over_a_tensor_is_unrolled_up_to_a_bound() -> None:
    region, _ = traced(adds_rows)
    assert region is not None and sum("getitem" in str(t) for t in targets(region)) == 2
    assert region.decisions, "another input has other rows"
    region, reason = traced(adds_rows, torch.randn(65, 1))
    assert region is None and "iterated" in reason


def test_a_split_by_sizes_has_its_parts_without_inputs_and_decides_nothing() -> None:
    region, _ = traced(adds_parts, None)
    assert region is not None and region.decisions == ()
    assert sum("getitem" in str(t) for t in targets(region)) == 2


def test_a_chunk_has_as_many_parts_as_its_input_allows() -> None:
    region, reason = traced(adds_chunks, None)
    assert region is None and "iterated" in reason
    region, _ = traced(adds_chunks)
    assert sum("getitem" in str(t) for t in targets(region)) == 2


def test_the_number_of_axes_is_known() -> None:
    region, _ = traced(by_axes)
    assert "relu" in targets(region)


def keywords(x: Tensor) -> Tensor:
    sizes = {"a": x.shape[0], "b": x.shape[1]}
    return x.new_zeros(tuple(sizes[key] for key in sizes)) + x.sum()


def test_a_number_known_from_a_parameter_alone_is_no_decision() -> None:
    weight = nn.Parameter(torch.randn(3, 4))

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x.relu() if self.weight.shape[0] == 3 else x

    traced = trace_regions(Tree(Holds()), Inputs.of(X))
    regions, opaque = traced.regions, traced.opaque
    assert not opaque and regions[0].decisions == ()


def test_a_tensor_is_no_number() -> None:
    region, reason = traced(lambda x: x * float(x.sum()))
    assert region is None
    assert reason == "TraceError: needs the value of a tensor or a size as a number"


def test_the_length_of_an_unknown_value_is_refused() -> None:
    region, reason = traced(lambda x: x * len(x), None)
    assert region is None
    assert reason == "TraceError: needs the length of a value that is not known"


@pytest.mark.parametrize("example", [X, None])
def test_sizes_that_only_flow_on_need_no_number(example: Tensor | None) -> None:
    region, _ = traced(keywords, example)
    assert region is not None and region.decisions == ()
