"""A model to export, an object that runs a command when it is unpickled, and altered archives."""

from __future__ import annotations

import os
import zipfile

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("gain", torch.full((1,), 2.0))

    def forward(self, x, *, scale=1.0):
        return {"y": torch.relu(self.norm(self.conv(x))) * self.gain * scale}


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def altered(program, tmp_path, change):
    """The archive with members replaced by `change(name, content)`; None drops nothing."""
    path, _ = program
    target = tmp_path / "altered.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(name, content) or content)
    return target
