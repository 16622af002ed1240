"""Tiny checkpoint folders, as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 8, "tie_word_embeddings": False}),
    "phi": ("Phi", {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 3, "tie_word_embeddings": False}),
    "gpt-neox": ("GPTNeoX", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
}

Make = Callable[..., Path]


def draw_vectors_(model: torch.nn.Module) -> None:
    """Draw every parameter of one axis anew: weights of norms, and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.8)


def maker(place: Path) -> Make:
    """Return how to write a folder in a place: `make("llama", dtype=torch.bfloat16)`."""

    def made(name: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
        kind, options = FAMILIES[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**options)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        draw_vectors_(model)
        folder = place / name
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return made


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return how to write a folder, as `maker` does."""
    return maker(tmp_path)


def logits(folder: Path, seed: int = 0) -> torch.Tensor:
    """Return what transformers itself computes of a folder, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((a - b).abs().max() / a.abs().max())
