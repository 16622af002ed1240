"""A branch as a term: a convolution or nothing, and one map per channel after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from models.randomize import randomize_norms_
from rewrite.affine.algebra import Affine
from rewrite.affine.channel_map import DeclinedError
from rewrite.affine.constants import Constants
from rewrite.affine.planner import Planner
from rewrite.fold.branches.kernel import Term
from rewrite.fold.branches.terms import BranchTerms
from rewrite.fold.links import NEGATIVE
from rewrite.graph.capture import capture


class Sum(nn.Module):
    """y = join(...) of the layers and of x, which a tanh makes."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.more = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.same, self.wide = nn.Dropout(0.5), nn.Identity(), nn.Conv2d(4, 8, 1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.join(self, torch.tanh(x)))


def terms(join: Callable[..., Tensor]) -> tuple[tuple[Term, ...], Sum, Tensor]:
    model = Sum(join)
    randomize_norms_(model)
    model = model.double().eval()
    captured = capture(model, example_inputs=torch.randn(1, 4, 5, 5).double())
    planner = Planner(captured)
    branches = BranchTerms(captured, planner, Constants(captured, planner.context.ranks))
    nodes: dict[str, Node] = {node.name: node for node in captured.nodes()}
    root = nodes["relu"].all_input_nodes[0]
    return branches.between(root, nodes["tanh"]), model, torch.randn(2, 4, 5, 5).double()


def computed(found: tuple[Term, ...], model: Sum, x: Tensor) -> Tensor:
    total = torch.zeros(())
    for term in found:
        y = x if term.conv is None else model.get_submodule(term.conv.target)(x)
        total = total + y * term.affine.scale.view(-1, 1, 1) + term.affine.shift.view(-1, 1, 1)
    return total


@pytest.mark.parametrize(
    ("join", "count"),
    [
        (lambda m, x: m.a(x) + m.b(x), 2),
        (lambda m, x: m.bn(m.a(x)) + m.more(m.b(x)), 2),
        (lambda m, x: m.bn(m.a(x)) + m.more(x) + x, 3),
        (lambda m, x: m.a(x) - m.bn(m.b(x)), 2),
        (lambda m, x: x - (m.a(x) - m.b(x)), 3),
        (lambda m, x: m.more(m.bn(m.a(x) + x)), 2),
        (lambda m, x: m.more(m.bn(m.a(x) - x) + m.b(x)) * m.scale + x, 4),
        (lambda m, x: m.drop(m.same(m.a(x))) * m.scale + m.b(x), 2),
        (lambda m, x: torch.add(m.a(x), m.b(x)), 2),
        (lambda m, x: torch.sub(m.a(x), m.b(x), alpha=1), 2),
        (lambda m, x: m.bn(m.a(x)), 1),
    ],
)
def test_the_terms_add_up_to_the_value(join: Callable[..., Tensor], count: int) -> None:
    found, model, x = terms(join)
    assert len(found) == count
    torch.testing.assert_close(computed(found, model, x), join(model, x))
    by_links = [replace(term, affine=chained(term, model)) for term in found]
    torch.testing.assert_close(computed(tuple(by_links), model, x), join(model, x))


def chained(term: Term, model: Sum) -> Affine:
    """Return the map of a term as a recipe makes it: link by link, of the tensors that it names."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    affine = Affine.identity(4)
    for link in term.links:
        if link is NEGATIVE:
            affine = Affine(-affine.scale, -affine.shift)
        else:
            affine = link.value(tensors.__getitem__).after(affine)
    return affine


def test_each_map_names_the_tensors_that_it_is_made_of() -> None:
    found, _, _ = terms(lambda m, x: m.bn(m.a(x)) * m.scale - m.b(x))
    read = [{name for link in term.links for name in link.reads()} for term in found]
    assert read[0] >= {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "scale"}
    assert read[1] == set() and len(found[1].links) == 1, "its sign"


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (lambda m, x: m.a(m.b(x)), "a branch with two convolutions"),
        (lambda m, x: m.a(x) + 1.5, "a sum with a number"),
        (lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), "a weighed sum"),
        (lambda m, x: torch.sin(m.a(x)), "not linear"),
        (lambda m, x: m.a(x) * m.b(x), "not linear"),
    ],
)
def test_what_is_no_sum_of_linear_branches_is_declined(
    join: Callable[..., Tensor], reason: str
) -> None:
    with pytest.raises(DeclinedError) as error:
        terms(join)
    assert error.value.declined.reason == reason


def test_a_norm_in_training_mode_is_not_linear() -> None:
    model = Sum(lambda m, x: m.bn(m.a(x)) + x).double().eval()
    model.bn.train()
    captured = capture(model)
    planner = Planner(captured)
    branches = BranchTerms(captured, planner, Constants(captured, planner.context.ranks))
    nodes = {node.name: node for node in captured.nodes()}
    with pytest.raises(DeclinedError, match="not linear"):
        branches.between(nodes["add"], nodes["tanh"])


@pytest.mark.parametrize(("training", "passes"), [(False, True), (True, False)])
def test_dropout_passes_its_input_on_in_eval_mode_alone(training: bool, passes: bool) -> None:
    model = Sum(lambda m, x: m.drop(m.a(x)) + x).double().eval()
    model.drop.train(training)
    captured = capture(model)
    planner = Planner(captured)
    branches = BranchTerms(captured, planner, Constants(captured, planner.context.ranks))
    assert branches.passes_on(captured.calls("drop")[0]) is passes
    assert not branches.passes_on(captured.calls("a")[0])
