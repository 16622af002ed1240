"""Kappa is half the second derivative of the squared path norm."""

from __future__ import annotations

import pytest
import torch

from rewrite.rescaling.path_norm import path_norms
from rewrite.training import PathSGD
from tests.training.test_path_sgd import X, convolutional


@pytest.mark.parametrize("norm", [False, True])
def test_kappa_is_half_the_second_derivative_of_the_squared_path_norm(norm: bool) -> None:
    model = convolutional(norm).eval()
    kappa = PathSGD(model, lr=0.1, example_inputs=X).kappa()
    assert kappa.keys() == dict(model.named_parameters()).keys()

    def squared() -> float:
        # A norm as a layer of its own: the sum that κ differentiates.
        forward = PathSGD(model, lr=0.1, example_inputs=X)._curvature._forward
        return float(forward.run((torch.ones_like(X[:1]),)).detach())

    for name, parameter in model.named_parameters():
        flat, h = parameter.data.view(-1), 1.0
        old = float(flat[0])
        values = []
        for moved in (old + h, old, old - h):
            flat[0] = moved
            values.append(squared())
        flat[0] = old
        second = (values[0] - 2 * values[1] + values[2]) / h**2
        assert second / 2 == pytest.approx(float(kappa[name].view(-1)[0]), rel=1e-6)


def test_the_sum_that_kappa_differentiates_is_the_path_norm() -> None:
    model = convolutional()
    kappa = PathSGD(model, lr=0.1, example_inputs=X).kappa()
    weight = model[7].weight
    through = float(
        (kappa["7.weight"] * weight.detach() ** 2).sum() + model[7].bias.detach().square().sum()
    )
    assert through == pytest.approx(path_norms(model, (2,), X)[2] ** 2, rel=1e-12)
