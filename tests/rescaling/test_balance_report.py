"""How far layers are from balanced, as a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.rescaling.balance_report import balance_report


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def test_the_report_names_the_channel_that_dominates() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[2] *= 1000
    report = balance_report(model, torch.zeros(1, 3))
    (row,) = report.rows
    assert (row.writers, row.readers, row.channels) == (("0",), ("2",), 4)
    channel, share = row.dominant[0]
    assert channel == 2 and share > 0.99
    weights = [model[0].weight[2].detach(), model[2].weight[:, 2].detach()]
    written, read = (weight.square().sum() for weight in weights)
    assert row.worst == pytest.approx(float((written / read) ** 0.25), rel=1e-6)
    assert set(report.fixed) == {"2", "4"} and "Tanh" in report.fixed["2"]
    assert json.loads(report.to_json())["rows"][0]["dominant"][0][0] == 2


def test_a_balanced_pair_has_factor_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight.T)
    (row,) = balance_report(model, torch.zeros(1, 3)).rows
    assert row.typical == row.worst == pytest.approx(1)


def test_the_plot_is_a_picture_of_a_known_kind(tmp_path: Path) -> None:
    report = balance_report(chain(), torch.zeros(1, 3))
    assert report.plot(tmp_path / "balance.svg").read_text().startswith("<?xml")
    with pytest.raises(OptionError, match=r"png or \.svg"):
        report.plot(tmp_path / "balance.jpg")
