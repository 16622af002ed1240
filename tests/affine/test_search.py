"""How far a growth looks before it is told no: the work for a residual stream stays linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from passes import BatchNormToGroupNorm, FoldNorm
from rewrite.affine.search import PropagationSearch
from rewrite.protocol import apply_pass


class Block(nn.Module):
    """A pre-activation block: its first norm reads a sum that the shortcut reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


def stream(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    body = [Block() for _ in range(blocks)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *body, nn.BatchNorm2d(4), nn.ReLU())
    return models.randomize_norms_(model).eval()


@pytest.mark.parametrize("rewriting", [FoldNorm, BatchNormToGroupNorm])
def test_work_is_linear_in_the_blocks(rewriting, monkeypatch):
    visits = 0
    original = PropagationSearch._visit

    def counted(self, *arguments):
        nonlocal visits
        visits += 1
        return original(self, *arguments)

    monkeypatch.setattr(PropagationSearch, "_visit", counted)
    found = []
    for blocks in (10, 40):
        visits = 0
        apply_pass(rewriting(), stream(blocks))
        found.append(visits)
    assert found[1] <= 4.5 * found[0]


def test_a_stream_folds_what_it_did(monkeypatch):
    """Looking ahead changes when a growth is refused, never whether."""
    ahead = apply_pass(FoldNorm(), stream(6))
    monkeypatch.setattr(PropagationSearch, "_check_against", lambda self, value: None)
    whole = apply_pass(FoldNorm(), stream(6))
    assert [c.target for c in ahead.changes] == [c.target for c in whole.changes]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(ahead.model.double()(x), whole.model.double()(x))


@pytest.mark.parametrize("name", sorted(models.all_models()))
def test_looking_ahead_changes_no_decision(name, monkeypatch):
    def changes(rewriting):
        result = apply_pass(rewriting(), models.all_models()[name]().eval())
        return [(change.target, change.touched) for change in result.changes]

    ahead = [changes(rewriting) for rewriting in (FoldNorm, BatchNormToGroupNorm)]
    monkeypatch.setattr(PropagationSearch, "_check_against", lambda self, value: None)
    assert ahead == [changes(rewriting) for rewriting in (FoldNorm, BatchNormToGroupNorm)]
