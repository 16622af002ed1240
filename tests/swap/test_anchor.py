from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import models
from passes import BatchNormToGroupNorm, BatchNormToInstanceNorm, BatchNormToLayerNorm
from rewrite.errors import OptionError
from rewrite.protocol import Pass, apply_pass
from rewrite.swap.anchor import Recentering, anchored_norms, gain, largest_anchor


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    return models.randomize_norms_(model).double()  # type: ignore[return-value]


def converted(rewrite: Pass) -> nn.Sequential:
    model = apply_pass(rewrite, network()).model
    assert isinstance(model, nn.Sequential)
    return model


def deviation(anchor: float, rewrite: type = BatchNormToGroupNorm, **options: object) -> float:
    """The largest difference to γ (z − m) + β, m the group's mean."""
    model = converted(rewrite(anchor=anchor, **options))
    x = 3 * torch.randn(4, 3, 9, 9, dtype=torch.float64)
    z, norm = model[0](x), model[1]
    axes = {"groups": (1, 2, 3), "channels": (2, 3), "positions": (1,)}
    kind = "channels" if rewrite is BatchNormToInstanceNorm else "groups"
    kind = "positions" if options.get("over") == "c" else kind
    centred = z - z.mean(axes[kind], keepdim=True)
    weight = norm.weight[:, None, None] / gain(anchor)
    with torch.no_grad():
        return float((norm(z) - centred * weight - norm.bias[:, None, None]).abs().max())


@pytest.mark.parametrize(
    ("rewrite", "options"),
    [
        (BatchNormToGroupNorm, {"num_groups": 1}),
        (BatchNormToLayerNorm, {}),
        (BatchNormToLayerNorm, {"over": "c"}),
        (BatchNormToInstanceNorm, {}),
    ],
)
def test_a_large_anchor_leaves_only_the_mean(rewrite: type, options: dict[str, object]) -> None:
    errors = [deviation(anchor, rewrite, **options) for anchor in (1.0, 10.0, 100.0, 1000.0)]
    assert errors[0] > 1e-2
    for larger, smaller in pairwise(errors[1:]):
        assert smaller < larger / 30


def test_no_anchor_is_the_plain_norm() -> None:
    norm = converted(BatchNormToGroupNorm(num_groups=2, anchor=0))[1]
    assert norm.eps == network()[1].eps and torch.equal(norm.weight, network()[1].weight)
    assert list(anchored_norms(converted(BatchNormToGroupNorm(anchor=0)))) == []


def test_half_precision_gets_the_largest_anchor_that_fits() -> None:
    model = network().half()
    applied = apply_pass(BatchNormToGroupNorm(num_groups=1, anchor=1000.0), model)
    note, norm = applied.changes[0].note, applied.model[1]  # type: ignore[index]
    assert "the largest that torch.float16 holds" in note
    assert norm.eps < torch.finfo(torch.float16).max and torch.isfinite(norm.weight).all()
    assert largest_anchor(torch.ones(3), 1000.0) == 1000.0
    assert largest_anchor(torch.full((3,), 1e4).half(), 30.0) < 1.0


def test_recentering_ends_at_the_plain_norm() -> None:
    model = converted(BatchNormToGroupNorm(num_groups=2, anchor=30.0))
    plain = converted(BatchNormToGroupNorm(num_groups=2, anchor=0))
    recentre = Recentering(model, steps=10)
    seen = []
    for _ in range(12):
        recentre()
        seen.append(model[1].eps)
    assert seen == sorted(seen, reverse=True) and seen[-1] == pytest.approx(1e-5)
    torch.testing.assert_close(model[1].weight, plain[1].weight, rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-3)


def test_recentering_goes_on_from_trained_weights() -> None:
    model = converted(BatchNormToGroupNorm(num_groups=2, anchor=30.0))
    with torch.no_grad():
        model[1].weight.mul_(2)
    twin = copy.deepcopy(model)
    Recentering(model, steps=1)()
    assert torch.allclose(model[1].weight * gain(30.0), twin[1].weight, rtol=1e-4)
    with pytest.raises(OptionError, match="1 or more"):
        Recentering(model, steps=0)


@pytest.mark.parametrize("anchor", [-1.0, float("nan"), float("inf")])
def test_refuses_what_is_no_anchor(anchor: float) -> None:
    with pytest.raises(OptionError, match="anchor"):
        BatchNormToGroupNorm(anchor=anchor)
