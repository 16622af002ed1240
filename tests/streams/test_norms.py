"""Norms in an exported call: whole or written out, and what looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.streams.observed import values

X = torch.randn(2, 3, 8, dtype=torch.float64)


class Written(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight)


def rms(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def with_one_added(x: Tensor, w: Tensor) -> Tensor:
    return (1 + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))


def of_another_value(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(torch.tanh(x).pow(2).mean(-1, keepdim=True) + 1e-6))


def read_inside(x: Tensor, w: Tensor) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * normed + normed


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.LayerNorm(8), "layer"), (nn.RMSNorm(8), "rms"), (Written(rms), "rms"),
        (Written(with_one_added), "rms"),
    ],
    ids=str,
)  # fmt: skip
def test_a_norm_is_one_operation_however_it_is_written(model: nn.Module, kind: str) -> None:
    (norm,) = values(model.double(), X).norms
    assert (norm.kind, norm.channels) == (kind, 8)
    assert norm.value.op == "placeholder" and norm.weight is not None
    assert norm.weight.offset == (1 if getattr(model, "form", None) is with_one_added else 0)


@pytest.mark.parametrize("form", [over_tokens, of_another_value])
def test_what_is_no_norm_of_the_last_axis_is_none(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not values(Written(form).double(), X).norms


def test_what_else_reads_a_part_keeps_its_weight_outside() -> None:
    assert all(norm.weight is None for norm in values(Written(read_inside).double(), X).norms)
