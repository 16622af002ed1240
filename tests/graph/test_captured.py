"""A captured model answers who calls a module and who reads a value, and says when it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import rewrite
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured, TensorRef


class Chain(nn.Module):
    """Calls one layer twice, reads a buffer, and never calls another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.spare = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.same = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.fc(x)) * self.scale)


class Chooses(nn.Module):
    """Is one call to the tracer: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


def call(captured: Captured, name: str, which: int = 0) -> Node:
    return captured.calls(name)[which]


def function(captured: Captured, name: str) -> Node:
    return next(n for n in captured.nodes() if name in n.name)


def test_every_call_of_a_module_is_found_under_each_of_its_names() -> None:
    captured = capture(Chain())
    assert len(captured.calls("fc")) == 2 and captured.calls("same") == captured.calls("fc")
    assert captured.aliases("fc") == ("same",) and captured.aliases("norm") == ()
    assert captured.call_sites(call(captured, "fc", 1)) == captured.calls("fc")


def test_a_module_that_traced_code_calls_has_no_unknown_caller() -> None:
    captured = capture(Chain())
    assert captured.callers_known("norm") and captured.unknown_caller("norm") is None


def test_a_module_that_nothing_calls_may_be_called_from_elsewhere() -> None:
    captured = capture(Chain())
    assert not captured.callers_known("spare")
    assert captured.unknown_caller("spare") == "spare is not called in any traced forward"


def test_below_an_opaque_module_the_caller_is_the_code_that_was_not_traced() -> None:
    captured = capture(nn.Sequential(Chooses()))
    assert "0" in captured.opaque
    reason = captured.unknown_caller("0.inner")
    assert reason is not None and "0 is opaque" in reason
    assert captured.callers_known("0.inner.norm"), "the forward of inner was traced"


def test_the_readers_of_a_value_inside_a_traced_forward_are_all_known() -> None:
    captured = capture(Chain())
    readers = captured.readers(call(captured, "norm"))
    assert readers.known and [n.op for n in readers.nodes] == ["call_function"]


def test_a_value_that_is_returned_has_readers_that_nobody_knows() -> None:
    captured = capture(Chain())
    readers = captured.readers(call(captured, "fc", 1))
    assert not readers.known and readers.reason == "the value is returned by the model"


class Keeps(Chain):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(x)
        return self.fc(self.last)


def test_a_value_that_a_forward_keeps_has_readers_that_nobody_knows() -> None:
    captured = capture(Keeps())
    readers = captured.readers(call(captured, "norm"))
    assert not readers.known and readers.reason == "the value is kept as last"


class Optional(Chain):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if more is not None:
            y = y + more
        return self.fc(y)


def test_an_argument_that_the_forward_tests_may_bring_other_readers() -> None:
    captured = capture(Optional())
    readers = captured.readers(call(captured, "norm"))
    assert not readers.known and "branches on its argument more" in readers.reason


def test_a_forward_hook_may_read_the_value_of_a_module() -> None:
    model = Chain()
    model.norm.register_forward_hook(lambda *args: None)
    captured = capture(model)
    readers = captured.readers(call(captured, "norm"))
    assert not readers.known and "hook" in readers.reason
    assert captured.hooks("norm") and not captured.hooks("fc")


class Halved(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a plain parameter in nn.Linear
        return self.raw / 2

    @weight.setter
    def weight(self, value: Any) -> None:
        self.raw = value


@pytest.mark.parametrize("kind", ["parametrized", "property", "old hook"])
def test_a_weight_that_is_computed_is_more_than_the_layer(kind: str) -> None:
    layer: nn.Module = Halved(4, 4) if kind == "property" else nn.Linear(4, 4)
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(layer)
    if kind == "old hook":
        nn.utils.spectral_norm(layer)
    reasons = capture(nn.Sequential(layer)).hooks("0")
    expected = {"property": "computes its weight by a property"}.get(kind, "has a parametrization")
    assert len(reasons) == 1 and reasons[0].startswith(expected)


def test_each_call_knows_its_owner_its_line_and_its_shape() -> None:
    captured = capture(nn.Sequential(Chain()), example_inputs=torch.randn(2, 4))
    node = function(captured, "mul")
    assert captured.owner(node) == "0" and captured.frame(node).owner == "0"
    source = captured.source(node)
    assert source is not None and source.rpartition(":")[0].endswith("test_captured.py")
    assert captured.source_text(node) == "return self.fc(self.norm(self.fc(x)) * self.scale)"
    assert captured.shape(node) == (2, 4)


def test_without_inputs_a_value_has_no_shape() -> None:
    captured = capture(Chain())
    assert captured.shape(function(captured, "mul")) is None


def test_tensors_are_found_by_reference_and_tied_ones_by_their_storage() -> None:
    model = Chain()
    model.spare.weight = model.fc.weight
    captured = capture(model)
    ref = captured.ref(function(captured, "scale"))
    assert ref == TensorRef("", "scale") and captured.tensor(ref) is model.scale
    assert captured.ref(call(captured, "fc")) is None and captured.ref(3) is None
    assert captured.tied(TensorRef("fc", "weight")) == (TensorRef("spare", "weight"),)
    assert captured.tied(TensorRef("fc", "bias")) == ()


class Counts(Chain):
    def forward(self, x: Tensor) -> Tensor:
        first = self.scale[:2]
        first.add_(1)
        return self.norm(x) * self.scale


class Makes(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * torch.ones(4)


def test_a_tensor_is_fixed_unless_a_forward_writes_it_or_makes_it() -> None:
    for kind, fixed in ((Chain, True), (Counts, False), (Makes, False)):
        captured = capture(kind())
        reads = [n for n in captured.nodes() if n.op == "get_attr"]
        assert reads and all(captured.is_fixed(node) is fixed for node in reads), kind


class Warm(nn.Module):
    """Multiplies by a tensor of its code, that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)
        self.outer = {"weight": torch.randn(4, 4), "bias": torch.randn(4)}

    def forward(self, x: Tensor) -> Tensor:
        bias = self.outer["bias"]
        y = F.linear(self.norm(x), self.outer["weight"], bias)
        return self.head(F.layer_norm(y, (4,), bias, bias))


def test_a_tensor_of_the_code_is_no_tensor_of_a_module() -> None:
    model = Warm().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    captured = capture(model, (torch.randn(2, 4),))
    reads = [node for node in captured.nodes() if node.op == "get_attr"]
    assert reads and all(captured.ref(node) is None for node in reads)
    result = rewrite.convert(model, "fold", example_inputs=torch.randn(2, 4))
    assert not result.report.changes and result.report.skips
    x = torch.randn(3, 4)
    assert torch.equal(result.model(x), model(x))
