"""Models by name."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load
from tests.checkpoint.files import LINEAR, refused, same, small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_json_arguments_of_a_factory(tmp_path, factories):
    assert load('makers:build({"channels": 6})')[0].out_channels == 6
    torch.save(small().state_dict(), tmp_path / "s.pt")
    refused(tmp_path / "s.pt", "of another shape", factory='makers:build({"channels": 6})')


def test_hooks_of_a_factory_are_the_users_own_and_those_of_a_file_are_not(tmp_path, factories):
    import makers

    model = makers.hooked().eval()
    x = torch.randn(1, 3, 8, 8)
    torch.save(model.state_dict(), tmp_path / "s.pt")
    opened = load(tmp_path / "s.pt", factory="makers:hooked").eval()
    assert torch.equal(opened(x), model(x))
    torch.save(model, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "names makers.double")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_names_of_the_libraries(name):
    pytest.importorskip(name.partition(":")[0])
    model = load(name)
    assert sum(p.numel() for p in model.parameters()) == 11689512
    assert not model.training


def test_names_with_arguments_download_nothing(monkeypatch):
    pytest.importorskip("torchvision")

    def fail(*args, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    model = load('torchvision:fcn_resnet50({"num_classes": 3})')
    assert model.classifier[-1].out_channels == 3


def test_a_factory_is_a_function_a_class_or_a_module(factories):
    assert isinstance(load("makers:build"), nn.Sequential)
    assert isinstance(load("makers:Holder.build"), nn.Sequential)
    assert isinstance(load("makers:model"), nn.Sequential)
    assert isinstance(load('torch.nn:Linear({"in_features": 2, "out_features": 3})'), nn.Linear)


def test_a_factory_beside_the_user_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_me.py").write_text("from torch import nn\ndef build(): return nn.ReLU()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert isinstance(load("beside_me:build"), nn.ReLU)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("nowhere.at.all:build", "cannot import nowhere.at.all"),
        ("makers:nothing", "makers has no nothing"),
        ("makers:breaks", "raised RuntimeError: no GPU at all"),
        ("makers:exits", "raised SystemExit"),
        ("makers:returns", "returned a list, not an nn.Module"),
        ("makers:number", "is a int, not a callable"),
        ("makers:build({nope)", "no JSON"),
        ("makers:build([1])", "must be an object"),
        ('makers:build({"colour": 1})', "unexpected keyword argument"),
        ("torchvision:resnet1", "Unknown model"),
        ("timm:resnet1", "Unknown model"),
        ("timm:hf-hub:somebody/model", "no such file"),
        ("no-such-file", "no such file"),
        ("model.pt", "no such file"),
    ],
)
def test_names_that_lead_nowhere(factories, name, word):
    refused(name, name.partition("(")[0], word)


def test_a_factory_is_seeded_and_the_generators_stay(tmp_path):
    before = torch.get_rng_state()
    one, two = (load(LINEAR, seed=seed) for seed in (3, 3))
    assert same(one, two)
    assert not same(one, load(LINEAR, seed=4))
    assert torch.equal(before, torch.get_rng_state())
