"""Files to open: good ones, such that run something, and what a refusal has to look like."""

from __future__ import annotations

import time
import zipfile

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load
from rewrite.errors import CheckpointError


class Call:
    """Pickles as a call of `function` with `args`, followed by a state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


LINEAR = 'torch.nn:Linear({"in_features": 2, "out_features": 2})'


def small():
    """Return a model whose norm does something, in training mode."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        for value in (model[1].weight, model[1].bias, model[1].running_mean):
            value.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    return model


def in_eval():
    """Return a model in eval mode."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def refused(reference, *words, **options):
    """Check that a reference is refused in one line that holds the words, and return the line."""
    with pytest.raises(CheckpointError) as caught:
        load(reference, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text, text
    return text


def same(one, other):
    """Return whether two models hold the same tensors."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused_at_once(path, *words, **options):
    """Check that a file is refused in one line that holds the words, within two seconds of work."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert time.process_time() - start < 2
    for word in words:
        assert word in text, text


def rewritten(source, target, **how):
    """Write an archive anew, in another way."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **how) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


def with_attribute(name, value):
    """Return a layer that holds one more attribute."""
    model = nn.Sequential(nn.Linear(2, 2))
    vars(model)[name] = value
    return model


def handmade(tmp_path, stream):
    """A checkpoint whose pickle is `stream`."""
    plain, path = tmp_path / "plain.pt", tmp_path / "made.pt"
    torch.save(1, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            pickled = b"\x80\x02" + stream
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return path


def attack(tmp_path, payload):
    """Save a payload, and return the file."""
    path = tmp_path / "attack.pt"
    torch.save(payload, path)
    return path
