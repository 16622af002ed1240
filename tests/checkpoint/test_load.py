"""MODEL references: what opens, what does not and what the message says."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError


def small():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        for value in (model[1].weight, model[1].bias, model[1].running_mean):
            value.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    return model


FACTORIES = """
from torch import nn
def build(channels=4, train=True):
    norm = nn.BatchNorm2d(channels)
    return nn.Sequential(nn.Conv2d(3, channels, 3), norm, nn.ReLU(), nn.Flatten())
def breaks():
    raise RuntimeError("no GPU\\nat all")
def returns():
    return [1]
def exits():
    raise SystemExit(3)
class Holder:
    build = staticmethod(build)
model = build()
number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "makers.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "makers"
    sys.modules.pop("makers", None)


def refused(reference, *words, **options):
    with pytest.raises(CheckpointError) as caught:
        load(reference, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text, text
    return text


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- whole modules ------------------------------------------------------------------------------


def test_a_pickled_module(tmp_path):
    model = small()
    torch.save(model, tmp_path / "m.pt")
    back = load(tmp_path / "m.pt")
    assert same(model, back)
    assert same(model, load(str(tmp_path / "m.pt")))


def test_save_and_load_keep_everything(tmp_path):
    model = small()
    model.tied = nn.Conv2d(3, 4, 3)
    model.tied.weight = model[0].weight
    model.alias = model[1]
    model.hidden = [nn.Linear(2, 2).double()]
    model[0].to(memory_format=torch.channels_last)
    model[0].bias.requires_grad_(False)
    model.low = nn.Linear(2, 2).to(torch.bfloat16)
    model.matrix = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    model.eval()
    model[1].train()
    back = load(save(model, tmp_path / "m.pt"))
    assert same(model, back)
    assert [m.training for m in back.modules()] == [m.training for m in model.modules()]
    assert back.tied.weight is back[0].weight
    assert back.alias is back[1]
    assert back.hidden[0].weight.dtype == torch.float64
    assert back[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not back[0].bias.requires_grad
    assert back[0].weight.requires_grad
    assert back.low.weight.dtype == torch.bfloat16
    assert back.matrix.stride() == model.matrix.stride()


def test_the_file_is_mapped_and_writing_does_not_change_it(tmp_path):
    model = small()
    path = save(model, tmp_path / "m.pt")
    before = path.read_bytes()
    back = load(path)
    with torch.no_grad():
        back[0].weight.zero_()
    assert path.read_bytes() == before
    assert same(model, load(path))


def test_saving_over_the_file_that_is_loaded_keeps_the_model(tmp_path):
    path = save(small(), tmp_path / "m.pt")
    back = load(path)
    save(nn.Linear(2, 2), path)
    assert same(back, small())


def test_save_does_not_change_the_model(tmp_path):
    model = small()
    before = {key: id(value) for key, value in vars(model[0]).items()}
    save(model, tmp_path / "m.pt")
    assert same(model, small())
    assert {key: id(value) for key, value in vars(model[0]).items()} == before


@pytest.mark.parametrize("what", ["lambda", "class", "method"])
def test_what_no_file_can_hold_is_named_and_nothing_is_written(tmp_path, what):
    class Local(nn.Module):
        pass

    model = small()
    if what == "class":
        model[3] = Local()
    else:
        model[2].act = (lambda x: x) if what == "lambda" else model.train
    with pytest.raises(CheckpointError, match=r"^(2\.act|3): holds the (function|class|method)"):
        save(model, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_to_overwrite_when_told(tmp_path):
    path = save(small(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="already exists"):
        save(nn.Linear(1, 1), path, overwrite=False)
    assert same(load(path), small())


def test_a_missing_output_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        save(small(), tmp_path / "no" / "m.pt")


# -- state dicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {"model_state_dict": s},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {"model_ema": s},
    ],
    ids=[
        "plain",
        "state_dict",
        "model",
        "model_state_dict",
        "twice",
        "parallel",
        "compiled",
        "ema",
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts_with_a_factory(tmp_path, factories, nest, legacy):
    model = small()
    path = tmp_path / "s.pth"
    torch.save(nest(model.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    back = load(path, factory="makers:build")
    assert same(model, back)
    assert not back.training


def test_safetensors(tmp_path, factories):
    from safetensors.torch import save_file

    save_file(dict(small().state_dict()), tmp_path / "s.safetensors")
    assert same(load(tmp_path / "s.safetensors", factory="makers:build"), small())
    refused(tmp_path / "s.safetensors", "--factory")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 200)
    refused(tmp_path / "bad.safetensors", "safetensors", factory="makers:build")


def test_a_module_inside_a_training_checkpoint(tmp_path):
    torch.save({"model": small(), "epoch": 1}, tmp_path / "c.pt")
    assert same(load(tmp_path / "c.pt"), small())


@pytest.mark.parametrize("dropped", [None, "0.weight", "1.weight"])
def test_tied_parameters_of_the_factory_stay_tied(tmp_path, monkeypatch, dropped):
    """safetensors files keep only one of the keys of a tied parameter."""
    code = """
    from torch import nn
    def build():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        model[0].bias.requires_grad_(False)
        return model
    """
    (tmp_path / "tied_makers.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("tied_makers", None)
    import tied_makers

    state = tied_makers.build().state_dict()
    if dropped is not None:
        del state[dropped]
    torch.save(state, tmp_path / "s.pt")
    back = load(tmp_path / "s.pt", factory="tied_makers:build")
    assert back[0].weight is back[1].weight
    kept = "1.weight" if dropped == "0.weight" else "0.weight"
    assert torch.equal(back[0].weight, state[kept])
    assert not back[0].bias.requires_grad


def test_old_batch_norms_without_a_counter(tmp_path, factories):
    """torch 0.4 wrote no `num_batches_tracked`; the module itself knows how to do without."""
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    del state._metadata
    torch.save(state, tmp_path / "s.pt")
    back = load(tmp_path / "s.pt", factory="makers:build")
    assert torch.equal(back[1].running_var, state["1.running_var"])


def test_the_loaded_model_has_the_dtype_of_the_file(tmp_path, factories):
    torch.save(small().half().state_dict(), tmp_path / "s.pt")
    back = load(tmp_path / "s.pt", factory="makers:build")
    assert back[0].weight.dtype == torch.float16
    assert back[1].num_batches_tracked.dtype == torch.int64


def test_keys_that_do_not_match_are_counted_and_named(tmp_path, factories):
    state = small().state_dict()
    state["extra.weight"] = state.pop("0.weight")
    state["1.weight"] = torch.ones(7)
    torch.save(state, tmp_path / "s.pt")
    refused(
        tmp_path / "s.pt",
        "1 missing (0.weight)",
        "1 unexpected (extra.weight)",
        "1 of another shape (1.weight (7,) instead of (4,))",
        factory="makers:build",
    )


def test_json_arguments_of_a_factory(tmp_path, factories):
    assert load('makers:build({"channels": 6})')[0].out_channels == 6
    torch.save(small().state_dict(), tmp_path / "s.pt")
    refused(tmp_path / "s.pt", "of another shape", factory='makers:build({"channels": 6})')


# -- names --------------------------------------------------------------------------------------


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


# -- bad files ----------------------------------------------------------------------------------


def test_a_folder(tmp_path):
    refused(tmp_path, "is a folder")


def test_an_empty_file(tmp_path):
    (tmp_path / "m.pt").touch()
    refused(tmp_path / "m.pt", "is empty")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(tmp_path, seed):
    import random

    (tmp_path / "m.pt").write_bytes(random.Random(seed).randbytes(1000))
    refused(tmp_path / "m.pt", "m.pt")


@pytest.mark.parametrize("kept", [4, 30, 200, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file(tmp_path, kept, legacy):
    torch.save(small().state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    text = refused(tmp_path / "m.pt", "m.pt")
    assert "--factory" not in text


@pytest.mark.parametrize("flip", range(0, 2400, 97))
def test_a_damaged_byte_is_never_a_traceback(tmp_path, flip):
    path = save(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), tmp_path / "m.pt")
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 0xFF
    path.write_bytes(data)
    try:
        load(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("text", ["import torch\n", "hello", "<html>\n" * 300, "γράμματα\n" * 100])
def test_a_text_file(tmp_path, text):
    (tmp_path / "m.pt").write_text(text)
    refused(tmp_path / "m.pt", "is a text file")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_says_what_to_give_instead(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "m.pt"))
    refused(tmp_path / "m.pt", "TorchScript", "torch.save(model)")


def test_an_onnx_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    refused(tmp_path / "m.onnx", "ONNX")


def test_a_file_of_something_else(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "neither a model nor a state dict", "epoch")
    torch.save(torch.ones(3), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "a Tensor")


def test_a_state_dict_without_a_factory(tmp_path):
    torch.save(small().state_dict(), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "state dict of 7 tensors", "--factory")


def test_a_module_with_a_factory(tmp_path):
    refused(save(small(), tmp_path / "m.pt"), "drop the factory", factory="makers:build")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_a_file_without_permission(tmp_path):
    path = save(small(), tmp_path / "m.pt")
    path.chmod(stat.S_IWUSR)
    refused(path, "permission")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_loading_a_large_state_dict_holds_it_once(tmp_path):
    """Resident memory of a 200 MB state dict, over that of the imports: at most 1.2 times."""
    program = textwrap.dedent(
        """
        import re, sys
        from pathlib import Path
        from rewrite.checkpoint.load import load
        status = Path("/proc/self/status")
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
        before = peak()
        kwargs = '({"in_features": 5000, "out_features": 10000})'
        model = load(sys.argv[1], factory=f"torch.nn:Linear{kwargs}")
        total = sum(float(p.sum()) for p in model.parameters())
        print((peak() - before) / sum(p.numel() * 4 for p in model.parameters()))
        """
    )
    torch.save(nn.Linear(5000, 10000).state_dict(), tmp_path / "s.pt")
    command = [sys.executable, "-c", program, str(tmp_path / "s.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.2
