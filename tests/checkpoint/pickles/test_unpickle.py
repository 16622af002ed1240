"""What a checkpoint may ask for: attack files stay files, ordinary models open."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.checkpoint.pickles.unpickle import load_pickle
from tests.checkpoint.files import Call, attack, handmade, refused


@pytest.mark.parametrize("nested", [False, True])
def test_system_call_is_refused_and_named(tmp_path, trap, nested):
    payload = Call(os.system, f"touch {trap}")
    path = attack(
        tmp_path, {"state_dict": {"w": torch.ones(1)}, "x": payload} if nested else payload
    )
    refused(path, "posix.system")
    assert not trap.exists()


def test_the_attack_file_is_armed(tmp_path, trap):
    path = attack(tmp_path, Call(os.system, f"touch {trap}"))
    torch.load(path, weights_only=False)
    assert trap.exists()


def test_a_graph_module_with_source_code_is_refused(tmp_path):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    refused(attack(tmp_path, graph))


def test_a_trusted_package_loads_its_modules_enums_and_options(tmp_path, package):
    net = package.Net()
    back = load(save(net, tmp_path / "net.pt"), trust=["stranger"])
    assert back.mode is package.Mode.FAST
    assert back.options.width == 3
    assert torch.equal(back.layer.weight, net.layer.weight)


def test_nothing_is_looked_up_on_anything_else(tmp_path, package):
    for arguments in ((package.Net, "forward"), (package.Mode, "FAST", 1), ("x", "join"), ()):
        path = attack(tmp_path, Call(getattr, *arguments))
        refused(path, "builtins.getattr", "no model needs", trust=["stranger"])
    net = package.Net()
    net.act = getattr
    refused(attack(tmp_path, net), "keeps builtins.getattr", trust=["stranger"])


def test_a_function_trusted_by_name_is_held_and_never_called(tmp_path, package):
    path = attack(tmp_path, Call(package.harm, "x"))
    refused(path, "calls stranger.net.harm", trust=["stranger", "stranger.net.harm"])
    path = attack(tmp_path, Call(functools.partial, package.harm))
    load_pickle(path, trust=["stranger", "stranger.net.harm"])
    assert not (Path(package.__file__).parent / "harmed").exists()


def test_a_hand_made_pickle_that_calls_what_it_likes(tmp_path):
    stream = b"cbuiltins\neval\n" + b"X\x05\x00\x00\x001 + 1" + b"\x85R."
    assert pickle.loads(b"\x80\x02" + stream) == 2
    refused(handmade(tmp_path, stream), "builtins.eval")


def test_an_argument_of_an_instance_is_refused(tmp_path):
    refused(
        handmade(tmp_path, b"ctorch.nn.modules.linear\nLinear\nK\x03K\x04\x86\x81."),
        "arguments of its own",
    )


def test_activations_and_classes_that_models_keep_open(tmp_path):
    model = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.functional.gelu)
    model.norm_layer = nn.BatchNorm2d
    model.make = functools.partial(nn.LayerNorm, eps=1e-3)
    back = load(save(model, tmp_path / "m.pt"))
    assert back.activation is nn.functional.gelu
    assert back.norm_layer is nn.BatchNorm2d
    assert back.make.func is nn.LayerNorm
    assert back.make.keywords == {"eps": 1e-3}


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_of_transformers_opens_and_its_classes_are_not_kept(tmp_path):
    """Building such a model may fetch code that its configuration names, so none is built."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
    model = transformers.ResNetModel(transformers.ResNetConfig(**sizes))
    back = load(save(model, tmp_path / "m.pt"))
    assert back.config.hidden_sizes == [8, 8]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True)
    )
    holder = nn.Linear(2, 2)
    holder.forward = type(model)
    torch.save(holder, tmp_path / "kept.pt")
    refused(tmp_path / "kept.pt", "keeps transformers.models.resnet")
    refused(attack(tmp_path, Call(type(model), model.config)), "calls transformers.models.resnet")
