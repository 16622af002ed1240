"""The model of a folder without numbers: its types, and calls whose forward asks for values."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.hub.folder import open_folder
from rewrite.hub.structure import Structure, structure_of, without_downloads
from rewrite.observe.calls import default_calls
from rewrite.runtime.leaves import tensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def saved(folder: Path, dtype: torch.dtype, **options: object) -> Path:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64, **options
    )
    transformers.GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    return folder


def structure(folder: Path) -> Structure:
    return structure_of(open_folder(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_without_numbers_has_the_types_of_its_folder_and_its_ties(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    found = structure(saved(tmp_path / "gpt2", dtype))
    held = dict(found.model.named_parameters(remove_duplicate=False))
    assert {tensor.dtype for tensor in held.values()} == {dtype}
    assert all(tensor.is_meta for tensor in held.values())
    assert held["lm_head.weight"] is held["transformer.wte.weight"]
    assert found.stored["lm_head.weight"] == "transformer.wte.weight"


def test_a_tensor_that_the_class_has_otherwise_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "gpt2", torch.float32)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    with pytest.raises(CheckpointError, match="has shape"):
        structure(folder)


@pytest.mark.parametrize("pad", [None, 0])
def test_a_forward_that_asks_for_values_is_called_like_any_other(
    tmp_path: Path, pad: int | None
) -> None:
    """GPT-2 looks for its token of padding among the first and last tokens."""
    found = structure(saved(tmp_path / "gpt2", torch.float32, pad_token_id=pad))
    calls = {call.name: call.inputs.kwargs for call in default_calls(found.model)}
    assert list(calls) == ["prefill", "padded mask, batch 2", "token types", "cache step"]
    assert {t.device.type for t in tensors(calls["cache step"])} == {"meta"}
    assert {type(t) for t in tensors(calls["cache step"])} == {torch.Tensor}


def test_a_configuration_fetches_nothing_and_keeps_what_shapes_a_model() -> None:
    inner = {"hidden_size": 3, "use_pretrained_backbone": True, "_attn_implementation": "a/b"}
    config = {"text_config": inner, "attn_implementation": "a/b:c", "hidden_act": "gelu"}
    made = without_downloads(config)
    assert made == {
        "text_config": {"hidden_size": 3, "use_pretrained_backbone": False},
        "hidden_act": "gelu",
    }
    assert inner["use_pretrained_backbone"] is True


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Its code would run."""
    folder = saved(tmp_path / "gpt2", torch.float32)
    place = folder / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, key: "stranger/kernel:attention"}))
    asked = []

    def connect(*_: object) -> None:
        asked.append(key)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert structure(folder).model.config._attn_implementation == "eager" and not asked
