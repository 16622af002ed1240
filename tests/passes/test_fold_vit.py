"""passes.fold on small vision transformers: every norm that only linear layers read goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import models
import rewrite
from passes import FoldNorm
from rewrite.graph.capture import capture
from rewrite.observe.evidence import observe
from rewrite.observe.outcomes import decide
from rewrite.observe.plan import ObservedFold, Options
from rewrite.outcomes import Site
from rewrite.runtime.inputs import ExampleCall, Inputs

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

SIZE, RIGHT = 32, 1e-12
NORMS = (nn.LayerNorm, nn.RMSNorm)


def timm_vit(**options: Any) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5, **options
    )


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(SIZE, 8, 2, 2, 24, 48, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


def timm_swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=SIZE, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2),
        num_classes=5,
    )  # fmt: skip


def torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=5)


MODELS = {
    "timm ViT": (timm_vit, 5),
    "timm DeiT": (lambda: timm_vit(class_token=True, global_pool="token", qkv_bias=True), 5),
    "torchvision ViT": (torchvision_vit, 5),
    "timm Swin": (timm_swin, 10),
    "torchvision Swin": (torchvision_swin, 10),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.randomize_norms_(MODELS[name][0]()).double().eval()
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return model, torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)


def folded(model: nn.Module, x: torch.Tensor) -> Any:
    result = rewrite.convert(model, FoldNorm(), example_inputs=x)
    for scale in (1, 100):
        with torch.inference_mode():
            want, got = model(scale * x), result.model(scale * x)
        assert (want - got).abs().max() <= RIGHT * want.abs().max()
    assert result.report.ok
    return result


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_that_only_linear_layers_read_folds(name: str) -> None:
    model, x = made(name)
    result = folded(model, x)
    norms = {n for n, part in model.named_modules() if isinstance(part, NORMS)}
    left = norms - {change.target for change in result.report.changes}
    reasons = {skip.target: skip.reason for skip in result.report.skips}
    assert len(norms) - len(left) == MODELS[name][1]
    assert all("normalizes by statistics of its input" in reasons[name] for name in left)


@pytest.mark.parametrize("name", ["timm Swin", "torchvision Swin"])
def test_a_padding_that_adds_nothing_at_this_size_is_named(name: str) -> None:
    model, x = made(name)
    notes = [change.note for change in folded(model, x).report.changes]
    assert any("holds for inputs of this size, for which" in note for note in notes)


@pytest.mark.parametrize("name", ["timm Swin", "torchvision Swin"])
def test_a_padding_that_adds_zeros_keeps_the_norm_before_it(name: str) -> None:
    model, _ = made(name)
    if name == "timm Swin":
        model.set_input_size((SIZE - 4, SIZE - 4), window_size=4)
    x = torch.randn(2, 3, SIZE - 4, SIZE - 4, dtype=torch.float64)
    skips = {skip.target: skip.reason for skip in folded(model, x).report.skips}
    assert [target for target in skips if target.endswith("norm1")]


@pytest.mark.parametrize("name", ["timm ViT", "torchvision ViT", "timm Swin", "torchvision Swin"])
def test_no_norm_is_refused_that_the_observed_calls_would_fold(name: str) -> None:
    model, x = made(name)
    captured = capture(model, x)
    evidence = observe(model, [ExampleCall("example input", Inputs.of(x))])
    observed = {
        target
        for target, _, decision in decide(captured, evidence, Options())
        if isinstance(decision, ObservedFold)
    }
    calls = (ExampleCall("example input", Inputs.of(x)),)
    found = FoldNorm().find(capture(model, x, calls))
    sites = {outcome.target for outcome in found if isinstance(outcome, Site)}
    assert observed <= sites
    assert observed, "the observed road folds some, too"


class Pooled(nn.Module):
    """A pool whose kind a call leaves at its default, and a head that another call leaves out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            x = x * mask
        return self.finish(self.norm(x))

    def pool(self, x: torch.Tensor, kind: str | None = None) -> torch.Tensor:
        kind = self.kind if kind is None else kind
        if kind == "first":
            return x[:, 0]
        return x.amax(1)

    def finish(self, x: torch.Tensor, raw: bool = False) -> torch.Tensor:
        x = self.pool(x)
        return x if raw else self.head(x)


class Raw(Pooled):
    """Its own caller may ask for what the norm gives."""

    def forward(self, x: torch.Tensor, raw: bool = False) -> torch.Tensor:  # type: ignore[override]
        return self.finish(self.norm(x), raw)


class Doubles(Pooled):
    """Code that no call takes reads the norm after it was called."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(x)
        if mask is not None:
            x = x * mask + 1
        return self.finish(x)


def test_code_before_the_norm_and_arguments_at_their_defaults_read_nothing_of_it() -> None:
    model = Pooled("first").double().eval()
    nn.init.normal_(model.norm.bias)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    result = folded(model, x)
    assert [change.target for change in result.report.changes] == ["norm"]
    mask = torch.rand(2, 5, 1, dtype=torch.float64)
    with torch.no_grad():
        assert (model(x, mask) - result.model(x, mask)).abs().max() < RIGHT


@pytest.mark.parametrize("model", [Raw("first"), Doubles("first"), Pooled("max")])
def test_code_behind_the_norm_may_read_it(model: nn.Module) -> None:
    model = model.double().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.normal_(model.norm.bias)
    result = folded(model, torch.randn(2, 5, 4, dtype=torch.float64))
    assert not result.report.changes
