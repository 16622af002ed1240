"""Weights drawn by what a report holds: the same bits as in memory, whatever was there before."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import rewrite
from passes import Reinitialize
from rewrite.errors import CheckpointError
from rewrite.fold.replay import apply_report


class Mixed(nn.Module):
    """Every kind of tensor that is drawn or filled."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=2)
        self.recurrent = nn.LSTM(6, 4, batch_first=True)
        self.conv = nn.Conv1d(4, 8, 3, groups=2, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.act = nn.PReLU()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.recurrent(self.embedding(ids))[0].transpose(1, 2)
        x = self.act(self.norm(self.conv(x))).mean(2)
        return self.two(self.one(x).relu())


def made(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = Mixed().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model.to(dtype)


def drawn(model: nn.Module, **options: Any) -> Any:
    return rewrite.convert(model, Reinitialize(**options), verify=False)


@pytest.mark.parametrize("scheme", ["he", "glorot:normal", "orthogonal", "trunc_normal:0.01"])
def test_another_checkpoint_gets_the_same_weights(scheme: str) -> None:
    options = {"scheme": scheme, "forget_bias": 1.0, "seed": 5}
    report = drawn(made(0), **options).report
    other = made(1, torch.bfloat16)
    replayed = apply_report(json.loads(report.to_json()), other.state_dict())
    wanted = drawn(other, **options).model.state_dict()
    assert set(replayed) == set(wanted)
    assert [k for k, v in wanted.items() if not torch.equal(replayed[k], v)] == []
    assert not bool(wanted["embedding.weight"][2].any()) and bool(wanted["one.weight"].any())
    # The negative twin: another seed is another draw.
    again = drawn(other, **{**options, "seed": 6}).model.state_dict()
    assert not torch.equal(again["one.weight"], replayed["one.weight"])


def test_what_is_left_alone_stays() -> None:
    model = made(0)
    report = rewrite.convert(model, Reinitialize(), only=["one", "norm"], verify=False).report
    replayed = apply_report(json.loads(report.to_json()), model.state_dict())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(replayed[k], v)}
    assert changed == {"one.weight", "two.weight", "one.bias", "norm.weight", "norm.bias",
                       "norm.running_mean", "norm.running_var"}  # fmt: skip


@pytest.mark.parametrize("kind", ["through", "lsuv", "residual"])
def test_what_a_seed_does_not_say_leaves_no_recipe(kind: str) -> None:
    linear = weight_norm(nn.Linear(4, 4)) if kind == "through" else nn.Linear(4, 4)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(x)

    options: dict[str, Any] = {"lsuv": {"lsuv": True}, "residual": {"residual": "zero"}}
    report = rewrite.convert(
        Residual(), Reinitialize(**options.get(kind, {})), calibration=[torch.randn(8, 4)],
        verify=False,
    ).report  # fmt: skip
    assert len(report.changes) == 1 and not report.changes[0].recipe
    with pytest.raises(CheckpointError, match="leaves no recipe"):
        apply_report(json.loads(report.to_json()), Residual().state_dict())
