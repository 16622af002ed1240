"""A name from a file is judged as text, before its module is imported."""

from __future__ import annotations

import argparse
import sys
import zipfile

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from tests.checkpoint.files import handmade, refused, refused_at_once

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", ["a.b", "a b", 'x")\rimport os#', "x\x1b[2J", ""])
@pytest.mark.parametrize("place", ["_modules", "_parameters", "_buffers"])
def test_names_are_names(tmp_path, name, place):
    model = nn.Sequential(nn.Linear(2, 2))
    value = nn.ReLU() if place == "_modules" else nn.Parameter(torch.ones(1))
    getattr(model, place)[name] = value
    torch.save(model, tmp_path / "m.pt")
    refused_at_once(tmp_path / "m.pt", "has the name")


@pytest.mark.parametrize(
    "name", ["torch.utils.model_dump.__main__.x", "timm.task.distillation.LogitDistillationTask",
             "torch.jit._script.RecursiveScriptModule", "timm.models._hub.load_custom_from_hf"]
)  # fmt: skip
def test_a_name_is_judged_before_its_module_is_imported(tmp_path, name):

    module, _, last = name.rpartition(".")
    stream = b"\x80\x02c" + module.encode() + b"\n" + last.encode() + b"\n)\x81."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("a/data.pkl", stream)
    known = module in sys.modules
    refused_at_once(tmp_path / "m.pt", name)
    assert (module in sys.modules) == known


def test_a_function_of_a_trusted_package_needs_its_full_name(tmp_path, package):
    net = package.Net()
    net.act = package.harm
    path = save(net, tmp_path / "net.pt")
    refused(path, "stranger.net.harm", "--trust stranger.net.harm", trust=["stranger"])
    assert load(path, trust=["stranger", "stranger.net.harm"]).act is package.harm


def test_what_a_trusted_package_imported_is_not_trusted(tmp_path, package):
    """`stranger.net.pathlib` and what is below it belong to somebody else."""
    package.Borrowed = argparse.ArgumentParser
    path = handmade(tmp_path, b"cstranger.net\nBorrowed\n)\x81.")
    refused(path, "argparse.ArgumentParser", trust=["stranger"])
    refused(handmade(tmp_path, b"cstranger.net\npathlib.Path\n."), trust=["stranger"])
