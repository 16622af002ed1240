"""Files are judged before torch is imported; the lists that this needs are what the code has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite.nn
from benchmarks import _hostile
from benchmarks.allowed_classes import VALUES, values_text
from rewrite.checkpoint.allowed_classes import OWN
from rewrite.checkpoint.load import save
from rewrite.checkpoint.pickles import tensors
from rewrite.checkpoint.pickles.names import has_meaning
from rewrite.checkpoint.vetting.names import listed, may_have_meaning
from rewrite.checkpoint.vetting.state import TENSORS
from rewrite.checkpoint.vetting.vet import vet, vet_pickle
from rewrite.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

REFUSE_ALL = """
import sys
import rewrite
from rewrite.cli.main import main
from rewrite.errors import CheckpointError
for path in sys.argv[1:]:
    command = "verify" if path.endswith(".onnx") else "inspect"
    assert main([command, path]) == 2, path
    if command == "inspect":
        try:
            rewrite.load(path)
        except CheckpointError as error:
            assert "\\n" not in str(error), path
        else:
            raise AssertionError(path)
    assert "torch" not in sys.modules, path
"""


def test_hostile_files_are_refused_without_torch(tmp_path):
    paths = [str(tmp_path / name) for name in _hostile.write(tmp_path)]
    assert len(paths) > 60
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_ALL, *paths], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == len(paths)
    assert not list(tmp_path.glob("pwned*"))


def test_what_opens_passes(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    model.kept = torch.tanh
    vet(save(model, tmp_path / "m.pt"))
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    vet(tmp_path / "old.pt")
    vet(save(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), tmp_path / "graph.pt"))
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "x": Path}, tmp_path / "c.pt")
    vet(tmp_path / "c.pt", factory="torch.nn:Linear")
    with pytest.raises(CheckpointError, match="--factory"):
        vet(tmp_path / "c.pt")
    torch.save((torch.ones(2), {"mask": None}), tmp_path / "inputs.pt")
    vet_pickle(tmp_path / "inputs.pt")
    torch.save(_hostile.payload("x"), tmp_path / "inputs.pt")
    with pytest.raises(CheckpointError, match="system"):
        vet_pickle(tmp_path / "inputs.pt")


def test_trust_is_heard(tmp_path):
    model = nn.Sequential(nn.ReLU())
    model.extra = _hostile.Call.__new__(_hostile.Call)
    model.extra.reduced = (_hostile.Call, ())
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="--trust benchmarks"):
        vet(tmp_path / "m.pt")
    vet(tmp_path / "m.pt", trust=["benchmarks"])


def test_the_lists_are_what_the_code_has():
    assert VALUES.read_text() == values_text()
    assert frozenset(tensors.BUILDERS) == TENSORS
    assert frozenset(rewrite.nn.__all__) == OWN


@pytest.mark.parametrize(
    ("place", "kind"),
    [("torch", "torch"), ("torch.fft", "torch.fft"), ("torch.linalg", "torch.linalg"),
     ("torch.special", "torch.special"), ("torch.Tensor", "methods")],
)  # fmt: skip
def test_no_name_that_has_a_meaning_is_refused_as_text(place, kind):
    names = [f"{place}.{name}" for name in listed(kind)]
    names += [f"torch.nn.functional.{name}" for name in dir(nn.functional)]
    names += [f"torch._C._nn.{name}" for name in dir(torch._C._nn)]
    known = [name for name in names if has_meaning(name)]
    assert len(known) > 10
    assert not [name for name in known if not may_have_meaning(name)]
    assert not may_have_meaning("torch.hub.load")
    assert not may_have_meaning(f"{place}.from_file")
