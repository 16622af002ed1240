"""What an exporter logs and warns does not reach the user; afterwards everything does again."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import rewrite
from rewrite.runtime.quiet import quiet


class Chooses(nn.Module):
    """A forward that no exporter enters: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if y.mean() > 100:
            y = y * 2
        return self.norm(y)


def test_a_refused_export_says_nothing_but_its_reason(capfd: pytest.CaptureFixture[str]) -> None:
    result = rewrite.convert(Chooses().eval(), "fold", example_inputs=torch.ones(1, 3, 4, 4))
    assert "norm" in result.report.skips[0].target
    assert capfd.readouterr() == ("", "")


def test_the_loggers_are_back_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        logging.getLogger("torch").error("unheard")
        warnings.warn("unheard", stacklevel=1)
    logging.getLogger("torch").error("heard")
    assert [record.message for record in caplog.records] == ["heard"]
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
