"""What rounding of stored parameters may change, as a bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rewrite
from rewrite.equivalence.exactness import present
from tests.equivalence.test_exactness import X, folded, network


class Amplifier(nn.Sequential):
    """A network that makes 1e-12 in its input 1e-7 in its output: rounding is large in it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - 0.999999 * y.detach().roll(1, 1).roll(-1, 1)


def test_names_that_are_gone_are_left_to_the_model_of_rounding() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    value = model[0].weight.detach().double
    assert present(model, {"0.weight": value, "1.weight": value, "0.scale": value}) == {
        "0.weight": value
    }


def test_a_model_that_amplifies_rounding_is_judged_right_and_wrong() -> None:
    model = Amplifier(*network(), nn.Conv2d(8, 4, 1)).eval()
    result = rewrite.convert(model, "fold", example_inputs=X)
    assert result.report.ok and result.report.verification.max_rel < 1e-9
    other, exact = folded(model)
    value = exact["0.bias"]
    wrong = {**exact, "0.bias": lambda: value() * (1 + 1e-6)}
    with torch.no_grad():
        other.get_submodule("0").bias.copy_(wrong["0.bias"]())
    assert not rewrite.verify(model, other, X, exact=wrong, level="quick").ok
