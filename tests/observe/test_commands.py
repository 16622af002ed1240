"""Every other command on models of transformers: as on a ResNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.cli.main import main

from .test_transformers import SIZES, made

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {**SIZES, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    ),
    "bert": ("BertForMaskedLM", {**SIZES, "max_position_embeddings": 64}),
}  # fmt: skip


def model_of(key: str) -> nn.Module:
    name, config = MODELS[key]
    return made(name, **config).float()


@pytest.mark.parametrize("key", MODELS)
def test_reinit_and_weight_norm(key: str) -> None:
    model = model_of(key)
    drawn = rewrite.convert(model, "reinit")
    assert drawn.report.ok and len(drawn.report.changes) >= 10
    normed = rewrite.convert(model, "weight-norm")
    assert normed.report.ok and len(normed.report.changes) >= 8
    assert normed.report.verification is not None


SLOW = [pytest.param(key, marks=pytest.mark.slow) for key in ("gpt2", "bert")]


@pytest.mark.parametrize("key", ["vit", *SLOW])
def test_export_is_verified_in_onnxruntime(key: str, tmp_path: Path) -> None:
    found = rewrite.export(model_of(key), tmp_path / "model.onnx")
    assert found.ok, found


def test_a_cache_becomes_outputs_of_the_graph(tmp_path: Path) -> None:
    import onnx

    assert rewrite.export(model_of("llama"), tmp_path / "model.onnx").ok
    names = [o.name for o in onnx.load(tmp_path / "model.onnx").graph.output]
    assert names[0] == "logits" and len(names) == 5
    assert all("keys" in name or "values" in name for name in names[1:])


def test_verify_finds_the_layer_of_a_fault() -> None:
    model = made("LlamaForCausalLM", **{**LLAMA, "num_hidden_layers": 5})
    other = copy.deepcopy(model)
    assert rewrite.verify(model, other).ok
    with torch.no_grad():
        other.get_submodule("model.layers.3.mlp.up_proj").weight[0, 0] += 1.0
    found = rewrite.verify(model, other)
    assert not found.ok
    assert "first diverging call: model.layers.3.mlp.up_proj" in str(found)


def test_the_commands_open_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder, out = str(tmp_path / "llama"), str(tmp_path / "out")
    model_of("llama").save_pretrained(folder)
    rewrite.convert(rewrite.load(folder), "reinit").model.save_pretrained(out)
    assert main(["verify", folder, folder, "--quick"]) == 0
    capsys.readouterr()
    assert main(["verify", folder, out, "--quick"]) == 1
    assert "first diverging call" in capsys.readouterr().out
    assert main(["inspect", "--signal", folder]) == 0
    assert "layers.1.mlp.down_proj" in capsys.readouterr().out
