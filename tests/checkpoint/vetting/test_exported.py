"""Members of an exported program are listed ones; nothing in it is pickled."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

from benchmarks._hostile import archive, members_of
from rewrite.checkpoint.archive import Archive
from rewrite.checkpoint.vetting.exported import vet_exported
from rewrite.errors import CheckpointError


@pytest.fixture(scope="module")
def members():
    data = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), data)
    return members_of(data.getvalue())


def vetted(members, **more):
    root = next(iter(members)).split("/")[0]
    given = {**members, **{f"{root}/{name}": data for name, data in more.items()}}
    return vet_exported(Archive(io.BytesIO(archive(given))))


def test_a_program_passes(members):
    assert vetted(members) == "models/model.json"


def test_a_pickled_tensor_and_a_strange_member(members):
    entry = {"use_pickle": True, "path_name": "weight_0", "tensor_meta": {}}
    config = json.dumps({"config": {"w": entry}}).encode()
    with pytest.raises(CheckpointError, match="pickled tensor"):
        vetted(members, **{"data/weights/model_weights_config.json": config})
    with pytest.raises(CheckpointError, match="no part of"):
        vetted(members, **{"data/x.so": b""})
    with pytest.raises(CheckpointError, match="2 programs"):
        vetted(members, **{"models/b.json": b"{}"})
