"""Which lines of a model's forwards can be edited, decided without changing anything."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node, symbolic_trace

import rewrite
from models.randomize import randomize_norms_
from rewrite.errors import PassError
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Counts(Scales):
    """Assigns an attribute: what a graph of its forward would not do."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = 1
        return self.fc(x) * self.scale


class ByMode(Scales):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) * self.scale
        return x + 1 if self.training else x


class Optional(Scales):
    """Multiplies once more if it is given another tensor."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x * self.scale
        if more is not None:
            x = x * more
        return self.fc(x)


class CallsBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Optional()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(x), x)


def product(captured: Captured) -> Node:
    return next(node for node in captured.nodes() if "mul" in node.name)


def test_a_line_of_a_plain_forward_can_be_edited() -> None:
    captured = capture(Scales().eval())
    assert captured.lines.refusal(product(captured)) is None
    line = captured.lines.line(product(captured))
    assert isinstance(line, Node) and line.name == "mul"


def test_a_line_is_given_in_the_graph_of_its_owner() -> None:
    captured = capture(nn.Sequential(Scales()).eval())
    line = captured.lines.line(product(captured))
    assert isinstance(line, Node)
    assert [node.target for node in line.all_input_nodes] == ["fc", "scale"], "not 0.fc"


@pytest.mark.parametrize("kind", [Counts, ByMode])
def test_a_forward_that_no_graph_can_stand_for_is_declined(kind: type[nn.Module]) -> None:
    captured = capture(kind().eval())
    reason = captured.lines.refusal(product(captured))
    assert reason and captured.lines.line(product(captured)) == reason
    with pytest.raises(PassError, match="forward"):
        captured.lines.open_line(product(captured))
    assert captured.lines.take_edited() == []


def test_a_line_that_runs_differently_at_different_calls_is_declined() -> None:
    captured = capture(CallsBoth().eval())
    alone, first, second = (node for node in captured.nodes() if "mul" in node.name)
    assert captured.lines.refusal(alone) is None
    for node in (first, second):
        reason = captured.lines.refusal(node)
        assert reason == "is a line of the forward of part, which tests its argument more"


def test_a_layer_can_be_replaced_whatever_its_line_says() -> None:
    captured = capture(Counts().eval())
    (node,) = captured.calls("fc")
    assert captured.lines.refusal(node) is None
    assert captured.lines.refusal(node, line=True) is not None


def test_asking_changes_nothing_and_opening_notes_the_forward_once() -> None:
    model = Scales().eval()
    before = copy.deepcopy(model.state_dict())
    captured = capture(model)
    captured.lines.refusal(product(captured))
    assert captured.lines.take_edited() == []
    forward, line = captured.lines.open_line(product(captured))
    assert line.name == "mul" and captured.lines.take_edited() == [forward]
    assert captured.lines.take_edited() == [], "what was taken is forgotten"
    assert type(model) is Scales and before.keys() == model.state_dict().keys()


def test_the_calls_of_a_graph_module_are_lines_of_a_graph_already() -> None:
    plain, graph = capture(Scales().eval()), capture(symbolic_trace(Scales().eval()))
    assert not plain.lines.in_graph_module(product(plain))
    assert graph.lines.in_graph_module(product(graph))
    assert graph.lines.refusal(product(graph)) is None


class Attend(nn.Module):
    """A linear step without a bias, and one more sum where there is a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight)
        y = y + y.tanh()
        if mask is not None:
            y = y + mask
        return y.relu()


class Masked(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.norm, self.attend, self.masked = nn.LayerNorm(4), Attend(), masked

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.attend(y, mask=x.sin()) if self.masked else self.attend(y)


def test_a_sum_with_a_mask_is_a_line_beside_the_other_sum() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    for masked in (True, False):
        model = randomize_norms_(Masked(masked)).double().eval()
        result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
        assert [change.target for change in result.report.changes] == ["norm"]
        assert torch.allclose(result.model(x), model(x), rtol=0, atol=1e-12)
