"""A network whose norms are folded on paper has the path norm of the folded one."""

from __future__ import annotations

import pytest
import torch

import rewrite
from tests.rescaling.paths import ORDERS, RIGHT
from tests.rescaling.test_path_norm import block


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("p", ORDERS)
def test_a_folded_network_has_the_norm_of_the_one_it_was(norm_first: bool, p: float) -> None:
    model, x = block(norm_first), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    folded = rewrite.convert(model, ["fold"], example_inputs=(x,)).model
    assert rewrite.path_norm(model, p, x) == pytest.approx(
        rewrite.path_norm(folded, p, x), rel=RIGHT
    )
    assert rewrite.path_norm(model.train(), p, x) == rewrite.path_norm(model.eval(), p, x)
