"""The covariance of channel means that the fit of a norm uses."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.affine.planner import Planner
from rewrite.calibration.batches import Batches
from rewrite.graph.capture import capture
from rewrite.grouping import fit
from rewrite.swap import keep_function as keep
from tests.grouping.test_regroup import data


def test_a_depthwise_layer_hands_on_what_the_weights_say() -> None:
    """With nothing in between and one tap, the covariance behind it is that in front, scaled."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1, groups=8), nn.GroupNorm(2, 8)
    ).double()
    ones, zeros = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    probes = [keep.SwappedNorm(str(i), model[i], ones, zeros) for i in (1, 3)]
    captured = capture(model)
    fits = fit.fits_of(captured, Planner(captured), probes)
    with torch.no_grad():
        fit.collect(model, fits, Batches(model, [data(1).double()], hold_out=0))
    first, second = (item.prior() for item in fits)
    slope = model[2].weight.detach().flatten().reshape(2, 4)
    assert fits[1].source is fits[0]
    torch.testing.assert_close(second, slope[:, :, None] * first * slope[:, None, :])
