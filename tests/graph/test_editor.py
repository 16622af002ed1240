from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace

import models
from rewrite.graph.capture import capture
from rewrite.graph.captured import TensorRef
from rewrite.graph.operators import norm_of


class Scaled(nn.Module):
    """A block with a functional norm, dropout that follows the mode, a child that others call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.extra = nn.Conv2d(4, 4, 1)
        self.depth = 3
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.gamma = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.gamma)
        return F.dropout(y, 0.5, self.training) * 2 + x.mean(1, keepdim=True)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Scaled()

    def forward(self, x):
        return self.block.extra(self.block(x))


def norm_node(captured):
    return next(node for node in captured.nodes() if norm_of(captured, node) is not None)


def test_a_line_changes_in_its_innermost_owner_only() -> None:
    model = Outer().eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model.block.extra(
        F.group_norm(model.block.conv(x), 2) * 2 + x.mean(1, keepdim=True)
    )  # fmt: skip
    captured = capture(model)
    name = captured.editor.substitute(norm_node(captured), nn.GroupNorm(2, 4, affine=False), "norm")
    captured.editor.commit()
    assert name == "block.norm" and type(model) is Outer
    assert isinstance(model.block, Scaled) and type(model.block).__name__ == "Scaled"
    assert torch.allclose(model(x), expected, atol=1e-6)
    # What outside code reads stays reachable; what only the old line read is gone.
    assert model.block.depth == 3 and isinstance(model.block.extra, nn.Conv2d)
    assert "block.mean" not in model.state_dict() and "block.gamma" not in model.state_dict()


def test_functional_dropout_follows_the_mode_again() -> None:
    model = Outer().eval()
    captured = capture(model)
    captured.editor.bypass(norm_node(captured))
    captured.editor.commit()
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_asking_changes_nothing() -> None:
    model = Outer()
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    children = {name: list(m._modules) for name, m in model.named_modules()}
    captured = capture(model)
    assert captured.lines.refusal(norm_node(captured)) is None
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before
    assert {name: list(m._modules) for name, m in model.named_modules()} == children


def test_a_forward_that_branches_on_its_mode_is_refused() -> None:
    class Branching(Scaled):
        def forward(self, x):
            y = F.batch_norm(self.conv(x), self.mean, self.var, self.gamma)
            if self.training:
                y = y * 2
            return y

    model = nn.Sequential(Branching()).eval()
    captured = capture(model)
    assert "branches on self.training" in captured.lines.refusal(norm_node(captured))


def test_set_tensor_never_writes_in_place() -> None:
    model = nn.BatchNorm2d(4).requires_grad_(False)
    old, old_mean = model.weight, model.running_mean
    editor = capture(model).editor
    editor.set_tensor(TensorRef("", "weight"), torch.full((4,), 3.0))
    editor.set_tensor(TensorRef("", "running_mean"), torch.full((4,), 2.0))
    assert model.weight is not old and torch.equal(old, torch.ones(4))
    assert torch.equal(old_mean, torch.zeros(4)) and model.running_mean[0] == 2
    assert not model.weight.requires_grad


def test_bypass_in_a_graph_module_erases_the_call() -> None:
    model = symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval())
    captured = capture(model)
    captured.editor.bypass(norm_node(captured))
    captured.editor.commit()
    assert [str(n.target) for n in model.graph.nodes if n.op == "call_module"] == ["0", "2"]
    assert "1" not in dict(model.named_children())


def test_a_line_of_a_graph_module_becomes_a_call() -> None:
    model, inputs = models.build("functional_norm")
    graph_module = symbolic_trace(model)
    captured = capture(graph_module)
    captured.editor.substitute(norm_node(captured), nn.GroupNorm(2, 8).double(), "norm")
    captured.editor.commit()
    assert captured.model is graph_module
    assert any(n.op == "call_module" and n.target == "norm" for n in graph_module.graph.nodes)
    assert torch.isfinite(graph_module(*inputs)).all()


def test_the_root_itself_can_be_replaced() -> None:
    model = nn.BatchNorm2d(4).eval()
    captured = capture(model)
    captured.editor.replace("", nn.Identity())
    assert type(captured.model) is nn.Identity


@pytest.mark.parametrize("training", [True, False])
def test_children_keep_their_modes(training: bool) -> None:
    model = Outer()
    model.block.extra.train(training)
    model.block.conv.train(not training)
    captured = capture(model)
    captured.editor.bypass(norm_node(captured))
    captured.editor.commit()
    assert model.block.extra.training is training and model.block.conv.training is not training
