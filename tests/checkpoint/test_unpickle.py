"""What a checkpoint may ask for: attack files stay files, ordinary models open."""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.checkpoint.pickles.unpickle import load_pickle
from rewrite.errors import CheckpointError


class Call:
    """Pickles as a call of `function` with `args`, followed by a state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def trap(tmp_path):
    """A file whose existence shows that something ran."""
    return tmp_path / "ran"


def refused(path, *words, **options):
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    for word in words:
        assert word in text, text
    return text


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
    path = tmp_path / "attack.pt"
    torch.save(payload, path)
    return path


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


@pytest.mark.parametrize(
    "payload",
    [
        Call(getattr, nn.Linear, "__init__"),
        Call(getattr, Call(getattr, nn.Linear, "__init__"), "__globals__"),
        Call(eval, "1 + 1"),
        Call(exec, "pass"),
        Call(__import__, "os"),
        Call(torch.load, "x.pt"),
        Call(torch.hub.load, "evil/repo", "model"),
        Call(torch.jit.load, "x.pt"),
        Call(Path.unlink, Path("x")),
    ],
    ids=lambda payload: getattr(payload.reduced[0], "__name__", "?"),
)
def test_functions_are_refused(tmp_path, payload):
    refused(attack(tmp_path, payload))


@pytest.mark.parametrize("trust", [("torch",), ("builtins", "posix", "os")])
def test_trusting_a_package_allows_none_of_its_functions(tmp_path, trap, trust):
    refused(attack(tmp_path, Call(os.system, f"touch {trap}")), trust=trust)
    refused(
        attack(tmp_path, Call(torch.hub.load, "evil/repo", "model")), "torch.hub.load", trust=trust
    )
    refused(attack(tmp_path, Call(eval, "1")), "builtins.eval", trust=trust)
    assert not trap.exists()


def test_a_module_class_may_not_be_called(tmp_path):
    """A constructor does what its arguments say, so only an empty instance is made."""
    refused(attack(tmp_path, Call(nn.Linear, 3, 4)), "calls torch.nn.modules.linear.Linear")


def test_a_class_is_not_called_through_a_rebuild_function(tmp_path):
    rebuild = Call(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (3, 4), {})
    refused(attack(tmp_path, rebuild), "calls torch.nn.modules.linear.Linear")


def test_a_partial_of_a_partial_of_nothing_allowed(tmp_path):
    refused(attack(tmp_path, Call(functools.partial, os.system, "true")), "posix.system")
    refused(attack(tmp_path, Call(functools.partial, functools.partial)), "partial")


def test_a_graph_module_with_source_code_is_refused(tmp_path):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    refused(attack(tmp_path, graph))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is importable and not trusted, and says when it is imported."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "net.py").write_text(
        textwrap.dedent(
            """
            import enum, pathlib
            from torch import nn
            pathlib.Path(__file__).with_name("imported").touch()
            class Mode(enum.Enum):
                FAST = 1
            class Options:
                width = 3
            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = nn.Linear(2, 2)
                    self.mode, self.options = Mode.FAST, Options()
                def forward(self, x):
                    return self.layer(x)
            def harm(*args):
                pathlib.Path(__file__).with_name("harmed").touch()
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import stranger.net as net

    yield net
    for name in ("stranger", "stranger.net"):
        sys.modules.pop(name, None)


def forget(package):
    folder = Path(package.__file__).parent
    (folder / "imported").unlink()
    for name in ("stranger", "stranger.net"):
        sys.modules.pop(name, None)
    return folder


def test_an_untrusted_class_is_refused_with_the_flag_and_not_imported(tmp_path, package):
    path = save(package.Net(), tmp_path / "net.pt")
    folder = forget(package)
    refused(path, "stranger.net.", "--trust stranger")
    assert not (folder / "imported").exists()
    assert type(load(path, trust=["stranger"])).__name__ == "Net"
    assert (folder / "imported").exists()


def test_a_trusted_package_loads_its_modules_enums_and_options(tmp_path, package):
    net = package.Net()
    back = load(save(net, tmp_path / "net.pt"), trust=["stranger"])
    assert back.mode is package.Mode.FAST
    assert back.options.width == 3
    assert torch.equal(back.layer.weight, net.layer.weight)


def test_a_member_of_an_enum_opens_as_python_3_11_2_writes_it(tmp_path, package):
    path = attack(tmp_path, {"mode": Call(getattr, package.Mode, "FAST")})
    assert load_pickle(path, trust=["stranger"])["mode"] is package.Mode.FAST
    refused(path, "package 'stranger' is not trusted")


@pytest.mark.parametrize("name", ["__class__", "mro", "SLOWEST"])
def test_nothing_else_is_looked_up_on_an_enum(tmp_path, package, name):
    path = attack(tmp_path, Call(getattr, package.Mode, name))
    refused(path, f"Mode.{name}", "no member", trust=["stranger"])


def test_nothing_is_looked_up_on_anything_else(tmp_path, package):
    for arguments in ((package.Net, "forward"), (package.Mode, "FAST", 1), ("x", "join"), ()):
        path = attack(tmp_path, Call(getattr, *arguments))
        refused(path, "builtins.getattr", "no model needs", trust=["stranger"])
    net = package.Net()
    net.act = getattr
    refused(attack(tmp_path, net), "keeps builtins.getattr", trust=["stranger"])


def test_a_function_of_a_trusted_package_needs_its_full_name(tmp_path, package):
    net = package.Net()
    net.act = package.harm
    path = save(net, tmp_path / "net.pt")
    refused(path, "stranger.net.harm", "--trust stranger.net.harm", trust=["stranger"])
    assert load(path, trust=["stranger", "stranger.net.harm"]).act is package.harm


def test_a_function_trusted_by_name_is_held_and_never_called(tmp_path, package):
    path = attack(tmp_path, Call(package.harm, "x"))
    refused(path, "calls stranger.net.harm", trust=["stranger", "stranger.net.harm"])
    path = attack(tmp_path, Call(functools.partial, package.harm))
    load_pickle(path, trust=["stranger", "stranger.net.harm"])
    assert not (Path(package.__file__).parent / "harmed").exists()


def test_what_a_trusted_package_imported_is_not_trusted(tmp_path, package):
    """`stranger.net.pathlib` and what is below it belong to somebody else."""
    package.Borrowed = argparse.ArgumentParser
    path = handmade(tmp_path, b"cstranger.net\nBorrowed\n)\x81.")
    refused(path, "argparse.ArgumentParser", trust=["stranger"])
    refused(handmade(tmp_path, b"cstranger.net\npathlib.Path\n."), trust=["stranger"])


def test_plain_data_of_training_scripts_opens(tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1),
        "kinds": frozenset({1, 2}),
        "span": slice(1, 2),
        "model": nn.Linear(2, 2),
    }
    torch.save(content, tmp_path / "training.pt")
    assert isinstance(load(tmp_path / "training.pt"), nn.Linear)


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
