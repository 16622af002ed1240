from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.training import penultimate_plane, plot_penultimate


def test_templates_keep_their_distances_and_what_is_normal_to_the_plane_is_lost() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 4)).double()
    templates = model[1].weight.detach()
    normal = torch.linalg.svd(torch.stack([templates[1] - templates[0],
                                           templates[3] - templates[0]]))[2][-1]  # fmt: skip
    inputs = torch.cat([templates, templates + 3 * normal])
    plane = penultimate_plane(model, inputs, torch.arange(4).repeat(2), classes=(0, 1, 3))
    for a, b in ((0, 1), (0, 3), (1, 3)):
        expected = (templates[a] - templates[b]).norm()
        torch.testing.assert_close((plane[a][0] - plane[b][0]).norm(), expected)
        torch.testing.assert_close(plane[a][0], plane[a][1], rtol=0, atol=1e-12)
    assert plane[0][0].abs().max() < 1e-12 < plane[1][0].abs().max()


def test_bad_input(tmp_path: Path) -> None:
    inputs, labels = torch.randn(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(OptionError, match="three different"):
        penultimate_plane(nn.Linear(5, 3), inputs, labels, (0, 0, 1))
    with pytest.raises(OptionError, match="the model has 3"):
        penultimate_plane(nn.Linear(5, 3), inputs, labels, (0, 1, 3))
    with pytest.raises(OptionError, match="no linear layer makes the logits"):
        penultimate_plane(nn.Sequential(nn.Linear(5, 3), nn.Tanh()), inputs, labels)
    with pytest.raises(OptionError, match="no plane"):
        plot_penultimate({}, tmp_path / "p.svg")
