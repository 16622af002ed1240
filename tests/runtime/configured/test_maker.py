"""Inputs by a configuration: what it names is made, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rewrite.runtime.configured.maker import (
    InputMaker,
    configured_inputs,
    forward_arguments,
    marks,
)


class Text(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4).double()
        self.config = SimpleNamespace(model_type="own", **config)

    def forward(self, input_ids: Any = None, decoder_input_ids: Any = None) -> None: ...


class Sound(Text):
    main_input_name = "input_features"

    def forward(self, input_features: Any = None, decoder_input_ids: Any = None) -> None: ...


class Image(Text):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Any = None) -> None: ...


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def shapes(model: nn.Module, batch: int = 2) -> dict[str, tuple[int, ...]]:
    made = InputMaker(model, model.config, torch.Generator().manual_seed(0))
    return {key: tuple(value.shape) for key, value in (made.inputs(batch) or {}).items()}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Text(vocab_size=8), {"input_ids": (2, 8)}),
        (
            Text(vocab_size=8, is_encoder_decoder=True),
            {"input_ids": (2, 8), "decoder_input_ids": (2, 5)},
        ),
        (
            Sound(num_mel_bins=5, is_encoder_decoder=True),
            {"input_features": (2, 32, 5), "decoder_input_ids": (2, 5)},
        ),
        (Image(image_size=(6, 4), num_channels=2), {"pixel_values": (2, 2, 6, 4)}),
        (Image(image_size=6, num_frames=3), {"pixel_values": (2, 3, 3, 6, 6)}),
    ],
)
def test_inputs_are_those_that_the_forward_names(model: nn.Module, expected: Any) -> None:
    assert shapes(model) == expected


def test_floats_have_the_type_of_the_model_and_tokens_its_vocabulary() -> None:
    model = Image(image_size=4)
    (found,) = configured_inputs(model, torch.Generator().manual_seed(0))
    assert found["pixel_values"].dtype == torch.float64
    text = Text(vocab_size=20, image_token_id=7)
    made = InputMaker(text, text.config, torch.Generator().manual_seed(0))
    ids = torch.stack([made.inputs(4)["input_ids"] for _ in range(20)])  # type: ignore[index]
    assert ids.max() < 20 and not (ids == 7).any()
    assert marks(text.config) == {7}


def test_a_wrapper_takes_what_its_model_takes() -> None:
    assert forward_arguments(Wrapper(Image(image_size=4))) == {"pixel_values"}


def test_nothing_is_made_where_nothing_is_known() -> None:
    assert list(configured_inputs(nn.Linear(2, 2), torch.Generator())) == []
    other = Text(vocab_size=8)
    other.forward = lambda graph: graph  # type: ignore[assignment,misc]
    assert list(configured_inputs(other, torch.Generator())) == []
