"""The format of `torch.save` before zip archives."""

from __future__ import annotations

import pytest
import torch

from rewrite.checkpoint.load import load
from tests.checkpoint.files import in_eval, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_the_old_format_opens_whole_models(tmp_path):
    torch.save(in_eval(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "m.pt"), in_eval())
