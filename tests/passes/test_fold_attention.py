"""passes.fold before multi-head attention: its projections take up the norm that they read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from rewrite.fold.replay import apply_report

WIDTH, RIGHT = 8, 1e-13


def prepare(model: nn.Module) -> nn.Module:
    """Randomize what is fresh: norms, and the biases of attention."""
    torch.manual_seed(1)
    models.randomize_norms_(model)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm) and part.bias is not None:
            nn.init.normal_(part.bias)
        if isinstance(part, nn.MultiheadAttention):
            for key in ("in_proj_bias", "bias_k", "bias_v"):
                if getattr(part, key) is not None:
                    nn.init.normal_(getattr(part, key))
    return model.double().eval()


def image() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 5, WIDTH, dtype=torch.float64)


def fold(model: nn.Module, *rest: Tensor) -> Any:
    """Fold; the result must be the same on other values, with its fast path and without it."""
    prepare(model)
    result = rewrite.convert(model, "fold", example_inputs=(image(), *rest))
    for x in (image(), 100 * image(), image()[:1]):
        inputs = (x, *(part[: len(x)] for part in rest))
        for context in (torch.inference_mode, torch.enable_grad):
            with context():
                want, got = model(*inputs), result.model(*inputs)
            for a, b in zip(_tuple(want), _tuple(got), strict=True):
                assert (a - b).abs().max() <= RIGHT * a.abs().max()
    assert result.report.ok
    return result


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def into(result: Any) -> dict[str, str]:
    return {c.target: c.after.rpartition("into ")[2] for c in result.report.changes}


def reasons(result: Any) -> dict[str, str]:
    return {skip.target: skip.reason for skip in result.report.skips}


class SelfAttention(nn.Module):
    """norm, attention, head."""

    def __init__(self, norm: Any = nn.LayerNorm, **options: Any) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(y, y, y, need_weights=False)[0])


class WithWeights(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.attention(y, y, y)


class QueryOnly(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.attention(self.norm(x), x, x)[0])


class KeysAndValues(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(x, value=y, key=y)[0])


class ClassAttention(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(y[:, :1], y, y)[0])


class AlsoAHead(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.attention(y, y, y)[0][..., :3] + self.head(y)


@pytest.mark.parametrize(
    "model",
    [
        SelfAttention(),
        SelfAttention(batch_first=True),
        SelfAttention(nn.RMSNorm),
        SelfAttention(nn.RMSNorm, bias=False),
        SelfAttention(add_bias_kv=True),
        SelfAttention(add_zero_attn=True),
        WithWeights(batch_first=True),
        QueryOnly(),
        KeysAndValues(batch_first=True),
        ClassAttention(batch_first=True),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_projections_absorb_the_norm(model: nn.Module) -> None:
    result = fold(model)
    assert into(result) == {"norm": "attention"}
    assert result.model.norm.weight is None
    assert type(result.model.attention) is nn.MultiheadAttention


def test_of_a_query_alone_a_third_of_the_weight_changes() -> None:
    model = QueryOnly()
    changed = fold(model).model.attention.in_proj_weight != model.attention.in_proj_weight
    assert changed[:WIDTH].all()
    assert not changed[WIDTH:].any()


def test_other_readers_of_the_norm_absorb_it_too() -> None:
    assert into(fold(AlsoAHead(batch_first=True))) == {"norm": "attention, head"}


class AddsTheNorm(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(y, y, y)[0] + y)


class MasksByIt(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(y, y, y, attn_mask=y[0] @ y[0].T)[0])


class CalledTwice(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(y, y, y)[0]) + self.head(self.attention(x, x, x)[0])


class ReadsTheWeight(SelfAttention):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.attention(y, y, y)[0]) * self.attention.in_proj_weight.sum()


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(6), nn.Linear(6, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x[..., :6])
        return self.attention(self.query(x[..., :6]), y, y)[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SelfAttention(bias=False), "attention has no bias to absorb a shift"),
        (AddsTheNorm(), "meets the normalized value in a sum"),
        (MasksByIt(batch_first=True), "matmul"),
        (CalledTwice(), "attention is called more than once"),
        (ReadsTheWeight(), "attention.in_proj_weight is also read by"),
        (Apart(), "attention keeps the projections of query, key and value apart"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_declines(model: nn.Module, reason: str) -> None:
    result = fold(model)
    assert not into(result)
    assert reason in reasons(result)["norm"]


class Own(nn.MultiheadAttention):
    """A subclass with a forward of its own: a call of the function."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class UsesOwn(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Own(WIDTH, 2, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attention(self.norm(x))


def test_the_function_absorbs_it_like_the_layer() -> None:
    result = fold(UsesOwn(batch_first=True))
    assert into(result) == {"norm": "attention"}
    assert not any("evidence" in note for note in result.report.notes)


# --- layers made of attention ---------------------------------------------------------------------


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True, **options)


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = encoder_layer(**options)
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


def test_an_encoder_layer_keeps_neutral_norms_for_its_fast_path() -> None:
    result = fold(encoder_layer(norm_first=True))
    assert into(result) == {"norm1": "self_attn", "norm2": "linear1"}
    for name in ("norm1", "norm2"):
        norm = getattr(result.model, name)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()
    assert all("it stays" in change.note for change in result.report.changes)


def test_the_neutral_norms_are_in_the_recipe_for_other_checkpoints() -> None:
    result = fold(encoder_layer(norm_first=True))
    other = prepare(encoder_layer(norm_first=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.01)
    state = apply_report(json.loads(result.report.to_json()), other.state_dict())
    rebuilt = encoder_layer(norm_first=True).double().eval()
    rebuilt.load_state_dict(state)
    x = image()
    with torch.no_grad():
        assert (rebuilt(x) - other(x)).abs().max() < 1e-12
    assert torch.equal(state["norm1.weight"], torch.ones(WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}], ids=["relu", "gelu"])
def test_every_norm_of_a_pre_norm_encoder_folds(options: Any) -> None:
    result = fold(Encoder(norm_first=True, **options))
    assert len(into(result)) == 5
    assert not reasons(result)
    assert not any("evidence" in note for note in result.report.notes), "the symbolic road"


def test_an_encoder_folds_with_a_mask_of_its_padding() -> None:
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert len(into(fold(Encoder(norm_first=True), mask))) == 5


def test_the_norms_of_a_post_norm_layer_stay() -> None:
    result = fold(encoder_layer())
    assert not into(result)
    assert "normalizes by statistics of its input" in reasons(result)["norm1"]
