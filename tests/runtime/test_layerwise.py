"""Layers are fitted in the order of the forward, each on what the fitted ones before it make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewrite.runtime.layerwise import fit_in_lockstep


class Backwards(nn.Module):
    """Calls its layers in another order than it registers them, the first one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.last(self.drop(self.first(x))))


def halve(name: str, layer: nn.Module, output: Tensor, again: Callable[[], Tensor]) -> Tensor:
    assert isinstance(layer, nn.Linear)
    layer.weight.div_(2)
    layer.bias.div_(2)
    return again()


def test_each_layer_is_fitted_once_in_the_order_of_calls() -> None:
    model = Backwards()
    layers = {name: model.get_submodule(name) for name in ("never", "last", "first")}
    order: list[str] = []

    def fit(name: str, layer: nn.Module, output: Tensor, again: Callable[[], Tensor]) -> Tensor:
        order.append(name)
        return output

    assert fit_in_lockstep(model, torch.randn(4, 3), layers, fit) == ("never",)
    assert order == ["first", "last"]


def test_a_layer_sees_what_the_fitted_ones_before_it_make() -> None:
    model = Backwards().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    before = model.first(x)
    seen: dict[str, Tensor] = {}

    def fit(name: str, layer: nn.Module, output: Tensor, again: Callable[[], Tensor]) -> Tensor:
        seen[name] = output.clone()
        return halve(name, layer, output, again)

    fit_in_lockstep(model, x, {"first": model.first, "last": model.last}, fit)
    torch.testing.assert_close(seen["first"], before)
    weight, bias = model.last.weight * 2, model.last.bias * 2
    torch.testing.assert_close(seen["last"], nn.functional.linear(before / 2, weight, bias))
    assert (seen["last"] - nn.functional.linear(before, weight, bias)).abs().max() > 1e-3


def test_modes_hooks_and_gradients_are_put_back() -> None:
    model = Backwards().train()
    model.last.eval()

    def fit(name: str, layer: nn.Module, output: Tensor, again: Callable[[], Tensor]) -> Tensor:
        assert not model.drop.training and not torch.is_grad_enabled()
        return halve(name, layer, output, again)

    fit_in_lockstep(model, torch.randn(4, 3), {"first": model.first}, fit)
    assert model.drop.training and not model.last.training and torch.is_grad_enabled()
    assert not model.first._forward_hooks


def test_an_error_while_fitting_leaves_no_hook() -> None:
    model = Backwards().train()

    def fit(name: str, layer: nn.Module, output: Tensor, again: Callable[[], Tensor]) -> Tensor:
        raise ValueError("no fit")

    with pytest.raises(ValueError, match="no fit"):
        fit_in_lockstep(model, torch.randn(4, 3), {"first": model.first}, fit)
    assert not model.first._forward_hooks and model.training


@pytest.mark.parametrize("batch", [(torch.randn(4, 3),), {"x": torch.randn(4, 3)}])
def test_a_batch_may_be_positional_or_by_keyword(batch: object) -> None:
    model = Backwards()
    assert fit_in_lockstep(model, batch, {"last": model.last}, halve) == ()


def test_a_hook_of_the_user_sees_the_fitted_output() -> None:
    model = Backwards()
    seen: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))

    def zero(name: str, layer: nn.Module, output: Tensor, again: Callable[[], Tensor]) -> Tensor:
        return torch.zeros_like(output)

    fit_in_lockstep(model, torch.randn(4, 3), {"first": model.first}, zero)
    assert not seen[0].any() and seen[1].any()
