"""Weights drawn anew through parametrizations: they read back as drawn, or the report tells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from passes import Reinitialize
from rewrite import convert

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Doubled(nn.Module):
    """W = 2 v, with its inverse."""

    def forward(self, v):
        return 2 * v

    def right_inverse(self, w):
        return w / 2


class Exponential(nn.Module):
    """W = exp(v): positive weights only, so that half of a draw is out of its range."""

    def forward(self, v):
        return v.exp()

    def right_inverse(self, w):
        return w.clamp_min(1e-3).log()


class Symmetric(nn.Module):
    """W = triu(v) + triu(v, 1)^T: a symmetric matrix."""

    def forward(self, v):
        return v.triu() + v.triu(1).mT

    def right_inverse(self, w):
        return w.triu()


class TwoFactors(nn.Module):
    """W = a * b of two tensors."""

    def forward(self, a, b):
        return a * b

    def right_inverse(self, w):
        return w, torch.ones_like(w)


class WrongInverse(nn.Module):
    """W = 2 v, whose inverse forgets the factor: what is read back is not what was written."""

    def forward(self, v):
        return 2 * v

    def right_inverse(self, w):
        return w


class Counting(nn.Module):
    """W = v: counts in a buffer how often it was asked, as spectral norm keeps its vectors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, v):
        return v

    def right_inverse(self, w):
        return w


def parametrized(*kinds: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
    for kind in kinds:
        parametrize.register_parametrization(model[0], "weight", kind, unsafe=True)
    return model


def drawn(model: nn.Module, scheme: str = "he"):
    return convert(model, [Reinitialize(scheme=scheme, seed=3)])


PLAIN = drawn(parametrized()).model


@pytest.mark.parametrize(
    "kinds", [(Doubled(),), (TwoFactors(),), (Doubled(), Doubled()), (Counting(),)],
    ids=["doubled", "two factors", "chained", "counting"],
)  # fmt: skip
def test_what_can_be_inverted_is_read_back_as_it_was_drawn(kinds) -> None:
    model = parametrized(*kinds)
    before = model[0].weight.detach().clone()
    result = drawn(model)
    torch.testing.assert_close(result.model[0].weight, PLAIN[0].weight, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.model(X), PLAIN(X), rtol=1e-12, atol=1e-12)
    assert [change.target for change in result.report.changes] == ["0", "2"]
    assert torch.equal(model[0].weight, before), "the argument stays"
    assert parametrize.is_parametrized(result.model[0], "weight")


@pytest.mark.parametrize(
    "kind", [Exponential(), Symmetric(), WrongInverse()], ids=lambda kind: type(kind).__name__
)
def test_what_the_parametrization_makes_of_a_draw_is_said(kind) -> None:
    """The weight cannot be what was drawn: the report says so, or the layer is left alone."""
    model = parametrized(kind)
    before = model[0].weight.detach().clone()
    result = drawn(model)
    told = [f"{change.after} {change.note}" for change in result.report.changes
            if change.target == "0"]  # fmt: skip
    told += [skip.reason for skip in result.report.skips if skip.target == "0"]
    assert len(told) == 1
    assert "parametrization" in told[0] or type(kind).__name__ in told[0], told
    read = result.model[0].weight
    assert torch.equal(read, before) or not torch.allclose(read, PLAIN[0].weight)
    torch.testing.assert_close(result.model[2].weight, PLAIN[2].weight, rtol=0, atol=0)


def test_the_vectors_of_spectral_norm_are_of_the_new_weight() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6))).double()
    for _ in range(20):
        model(X)
    result = drawn(model.eval()).model.eval()
    sigma = torch.linalg.matrix_norm(result[0].weight.detach(), 2)
    torch.testing.assert_close(sigma, torch.ones_like(sigma), rtol=1e-3, atol=0)
    direction = PLAIN[0].weight.detach() / torch.linalg.matrix_norm(PLAIN[0].weight.detach(), 2)
    torch.testing.assert_close(result[0].weight, direction, rtol=1e-3, atol=1e-3)
