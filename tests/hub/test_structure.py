"""The model of a folder without numbers: its types, and calls whose forward asks for values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.hub.folder import open_folder
from rewrite.hub.structure import Structure, structure_of
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
