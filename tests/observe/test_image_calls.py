"""Text with an image in it shows a vision tower; a text alone holds no token of an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.observe.calls import default_calls
from rewrite.observe.image_calls import images_in_text
from rewrite.runtime.configured.maker import marks

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip
IMAGE = 9


def llava(image_token: int = IMAGE) -> nn.Module:
    """Return a tiny Llava, every 1-D parameter drawn anew."""
    vision = {"model_type": "clip_vision_model", **SIZES, "image_size": 16, "patch_size": 8}
    vision["num_hidden_layers"] = 2  # the last but one is what the text gets
    text = {"model_type": "llama", **SIZES, "vocab_size": 16, "num_key_value_heads": 2}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=image_token
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def test_an_image_shows_the_norms_of_the_vision_tower() -> None:
    model = llava()
    result = rewrite.convert(model, "fold", verify=False)
    folded = {change.target for change in result.report.changes}
    tower = "model.vision_tower.encoder.layers.0."
    assert {f"{tower}layer_norm1", f"{tower}layer_norm2"} <= folded
    calls = {call.name: call for call in default_calls(model)}
    ids = calls["image in text"].inputs.kwargs["input_ids"]
    assert int((ids == IMAGE).sum()) == 4  # patches of an image of 16 by 16
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        given = calls["image in text"].inputs.kwargs
        before, after = model(**given).logits, result.model(**given).logits
    assert torch.allclose(before, after, atol=1e-5)


def test_a_text_alone_holds_no_token_of_an_image() -> None:
    model = llava(image_token=3)
    assert marks(model.config) >= {3}
    text = {c.name: c.inputs.kwargs for c in default_calls(model)}
    assert 3 not in text["prefill"]["input_ids"] and 3 not in text["cache step"]["input_ids"]


def test_a_model_of_text_is_given_no_image() -> None:
    config = transformers.LlamaConfig(vocab_size=16, **SIZES)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.ones(1, 8, dtype=torch.int64)
    assert not list(images_in_text(model, ids, torch.Generator()))
    assert marks(config) == frozenset()
