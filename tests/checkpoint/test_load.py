"""MODEL references: what opens, what does not and what the message says."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError
from tests.checkpoint.files import refused, same, small

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


def test_a_module_inside_a_training_checkpoint(tmp_path):
    torch.save({"model": small(), "epoch": 1}, tmp_path / "c.pt")
    assert same(load(tmp_path / "c.pt"), small())


# -- names --------------------------------------------------------------------------------------


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
