"""The network that tests of several files judge."""

from __future__ import annotations

import pytest
from torch import nn

from models.randomize import randomize_norms_
from tests.equivalence.networks import Net


@pytest.fixture
def net() -> nn.Module:
    """Return a network whose norm does something."""
    return randomize_norms_(Net())
