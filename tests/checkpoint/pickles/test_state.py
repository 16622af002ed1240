"""The state dict of a checkpoint; with a factory everything else stays inert."""

from __future__ import annotations

import io
import pathlib

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load
from rewrite.errors import CheckpointError
from tests.checkpoint.files import LINEAR, Call, refused_at_once, same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Foreign:
    """A class that no list has."""


def test_with_a_factory_only_tensors_matter(tmp_path):
    import numpy as np

    linear = nn.Linear(2, 2)
    notes = []
    content = {
        "network_weights": linear.state_dict(),
        "best": np.float64(0.9),
        "where": pathlib.Path("x"),
        "args": Foreign(),
        "optimizer": torch.optim.SGD(linear.parameters(), 0.1).state_dict(),
        "never": Call(exec, "raise SystemExit"),
    }
    torch.save(content, tmp_path / "c.pt")
    assert same(load(tmp_path / "c.pt", factory=LINEAR, note=notes.append), linear)
    assert [note.split()[2] for note in notes] == [key for key in content if key[0] != "n"] + [
        "never"
    ]
    refused_at_once(tmp_path / "c.pt", "--factory")


def test_a_wrapped_module_gives_its_tensors(tmp_path):
    linear = nn.Linear(2, 2)
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = linear
    data = io.BytesIO()
    wrapper.__class__.__getstate__, before = nn.Module.__getstate__, wrapper.__class__.__getstate__
    try:
        torch.save(wrapper, data)
    finally:
        wrapper.__class__.__getstate__ = before
    (tmp_path / "c.pt").write_bytes(data.getvalue())
    assert same(load(tmp_path / "c.pt", factory=LINEAR), linear)


def test_weights_as_arrays_are_taken_as_tensors(tmp_path):
    """Detectron2 writes them so; an array of objects is none."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    arrays = {key: value.numpy() for key, value in net.state_dict().items()}
    torch.save({"model": arrays, "__author__": "x", "stats": {"mean": arrays}}, tmp_path / "c.pt")
    factory = "tests.checkpoint.pickles.test_state:linear_and_norm"
    notes = []
    opened = load(tmp_path / "c.pt", factory=factory, note=notes.append)
    assert same(opened, net)
    assert notes == ["left out __author__ (str)", "left out stats (dict)"]
    opened[0].weight.data.add_(1)  # of its own memory
    torch.save({**arrays, "0.weight": arrays["0.weight"].astype("U8")}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"0\.weight is an array of <U8"):
        load(tmp_path / "c.pt", factory=factory)


def linear_and_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
