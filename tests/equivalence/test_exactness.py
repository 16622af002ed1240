"""rewrite.equivalence.exactness: tensors before they were rounded, and the rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from passes import FoldNorm
from rewrite.equivalence.exactness import misrounded, present
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model

X = torch.linspace(-2, 2, 2 * 3 * 12 * 12).view(2, 3, 12, 12).sin()


def network(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3)]
    for _ in range(depth):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return models.randomize_norms_(nn.Sequential(*layers).eval(), 1)


def folded(model: nn.Module) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    inputs = X.to(next(model.parameters()).dtype)
    applied = apply_pass(FoldNorm(), copy_model(model), inputs, keep_exact=True)
    return applied.model, dict(applied.exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fold_is_equal_to_1e_9_before_it_is_rounded(dtype) -> None:
    model = network().to(dtype)
    other, exact = folded(model)
    found = rewrite.verify(model, other, X.to(dtype), exact=exact)
    assert found.ok and found.max_rel < 1e-9 and found.rounding is None
    if dtype is not torch.float64:
        without = rewrite.verify(model, other, X.to(dtype))
        assert without.max_rel > 1e-9 and without.rounding is not None


@pytest.mark.parametrize("size", [1e-4, 1e-6])
def test_a_small_fault_in_one_channel_is_caught(size: float) -> None:
    model = network()
    other, exact = folded(model)
    value = exact["0.weight"]
    factor = torch.ones(8, 1, 1, 1, dtype=torch.float64)
    factor[3] += size
    wrong = {**exact, "0.weight": lambda: value() * factor}
    with torch.no_grad():
        other[0].weight.copy_(wrong["0.weight"]())
    found = rewrite.verify(model, other, X, exact=wrong, level="quick")
    assert not found.ok and found.divergence.target == "0"


def test_a_value_that_is_not_rounded_to_the_nearest_is_caught() -> None:
    model = network()
    other, exact = folded(model)
    assert misrounded(other, present(other, exact)) == []
    with torch.no_grad():
        flat = other[0].weight.view(-1)
        flat[5] = torch.nextafter(flat[5], torch.tensor(9.0))
    (reason,) = misrounded(other, present(other, exact))
    assert reason.startswith("0.weight is not what its exact value rounds to (1 of ")
    found = rewrite.verify(model, other, X, exact=exact, level="quick")
    assert not found.ok and found.reasons == (reason,)


def test_a_tensor_of_another_shape_or_with_nan_is_misrounded() -> None:
    model = nn.Linear(2, 2)
    exact = {"weight": lambda: torch.ones(2, 3, dtype=torch.float64)}
    assert "has the shape (2, 2)" in misrounded(model, exact)[0]
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    exact = {"weight": lambda: torch.ones(2, 2, dtype=torch.float64)}
    assert "4 of 4 values" in misrounded(model, exact)[0]


def test_a_tie_in_the_middle_may_go_either_way() -> None:
    model = nn.Linear(1, 1, bias=False)
    exact = {"weight": lambda: torch.full((1, 1), 1 + 2.0**-24, dtype=torch.float64)}
    for stored, right in ((1.0, True), (1 + 2.0**-23, True), (1 - 2.0**-24, False)):
        with torch.no_grad():
            model.weight.fill_(stored)
        assert (misrounded(model, exact) == []) is right
