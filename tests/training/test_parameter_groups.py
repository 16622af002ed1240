from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import models
from rewrite import parameter_groups
from rewrite.errors import OptionError
from rewrite.training import normalized_decay
from rewrite.weights.parameter_roles import Role, roles


def _decayed(model: nn.Module) -> set[str]:
    return set(parameter_groups(model, 0.1)[0]["names"])


class Disguised(nn.Module):
    """Parameters whose names say the opposite of what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_bias = nn.Parameter(torch.randn(6, 4))  # the matrix of a layer
        self.weight = nn.Parameter(torch.randn(1, 5, 6))  # added: a position table
        self.kernel = nn.Parameter(torch.randn(6, 1, 1))  # multiplied: a layer scale
        self.bias_norm = nn.Linear(6, 3)
        self.fc = nn.LayerNorm(6)
        self.table = nn.Parameter(torch.randn(9, 2))  # looked up by position
        self.register_buffer("index", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.norm_bias) + self.weight
        y = self.fc(y * self.kernel.view(6))
        return self.bias_norm(y) + self.table[self.index].sum()


class Tokens(nn.Module):
    """One embedding of data, one of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.places = nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))


def test_gains_of_parametrizations_do_not_decay() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
    )
    stem = "parametrizations.weight.original"
    assert _decayed(model) == {f"0.{stem}1", f"1.{stem}"}


def test_shared_and_frozen_parameters() -> None:
    model = Tokens()
    head = nn.Linear(4, 8, bias=False)
    head.weight = model.places.weight
    both = nn.ModuleDict({"embed": model, "head": head})
    model.words.weight.requires_grad_(False)
    groups = parameter_groups(both)
    assert groups[0]["params"] == [head.weight] and groups[1]["params"] == []


@pytest.mark.parametrize("name", models.all_models())
def test_every_parameter_of_the_corpus_once(name: str) -> None:
    model, _ = models.build(name)
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        pytest.skip("lazy parameters")
    groups = parameter_groups(model)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) >= {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.AdamW(groups, lr=0.1) if held else None
    decayed = set(groups[0]["names"])
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{key}" if prefix else key
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
                assert full not in decayed
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and full in (
                groups[0]["names"] + groups[1]["names"]
            ):
                assert (full in decayed) == (
                    key in ("weight", "weight_v") and parameter.dim() > 1
                ), full


def test_nothing_is_run_or_changed() -> None:
    model = Disguised().train()
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    assert roles(model)["norm_bias"] is Role.MATRIX
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before


def test_options() -> None:
    for decay in (-0.1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="weight_decay"):
            parameter_groups(nn.Linear(1, 1), decay)
    assert normalized_decay(0.05, 128, 50_000, 100) == pytest.approx(0.05 * (128 / 5e6) ** 0.5)
    with pytest.raises(OptionError, match="batch size 0"):
        normalized_decay(0.05, 0, 10, 1)
