"""What was measured of a model's signals, as rows, JSON, a table and a picture."""

import json

import pytest
import torch

from rewrite.errors import OptionError
from rewrite.signals.measure import signal
from tests.signals.test_measure import chain


def test_table_json_and_pictures(tmp_path):
    before = signal(chain(), torch.randn(4, 40))
    after = signal(chain(), 2 * torch.randn(4, 40))
    data = json.loads(after.to_json())
    assert data["rows"][0]["name"] == "0"
    assert "tanh" in str(after)
    for suffix in ("png", "svg"):
        path = after.plot(tmp_path / f"signal.{suffix}", before=before)
        assert path.stat().st_size > 5000
    assert "before" in (tmp_path / "signal.svg").read_text()
    with pytest.raises(OptionError, match=r"\.png or \.svg"):
        after.plot(tmp_path / "signal.gif")
