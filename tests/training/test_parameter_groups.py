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


def test_the_graph_decides_and_not_the_name() -> None:
    model = Disguised()
    assert _decayed(model) == {"norm_bias", "bias_norm.weight"}
    assert set(parameter_groups(model)[1]["names"]) == {
        "weight", "kernel", "table", "bias_norm.bias", "fc.weight", "fc.bias",
    }  # fmt: skip


class Branching(nn.Module):
    """A forward that no trace follows: its code is read instead."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4))
        self.second = nn.Parameter(torch.randn(4, 4))
        self.third = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            turned = self.first.t()
            return x @ turned + self.second
        return F.linear(x * self.third, self.first)


def test_code_that_cannot_be_traced() -> None:
    assert _decayed(Branching()) == {"first"}


def test_layers_of_every_kind() -> None:
    model = nn.ModuleDict(
        {
            "rnn": nn.LSTM(3, 4, 2, proj_size=2),
            "cell": nn.GRUCell(3, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "packed": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "bilinear": nn.Bilinear(2, 3, 4),
            "transposed": nn.ConvTranspose1d(2, 3, 3),
            "act": nn.PReLU(4),
            "gn": nn.GroupNorm(2, 4),
            "rms": nn.RMSNorm(4),
        }
    )
    names = dict(model.named_parameters())
    expected = {n for n, p in names.items() if p.dim() > 1 and not n.endswith(("bias_k", "bias_v"))}
    assert _decayed(model) == expected


class Tokens(nn.Module):
    """One embedding of data, one of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.places = nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))


def test_a_position_table_is_an_embedding_that_no_data_looks_up() -> None:
    assert _decayed(Tokens()) == {"words.weight"}


class Attention(nn.Module):
    """Queries meet keys and a bare tensor R: softmax(q kᵀ + q Rᵀ) v, unless told otherwise."""

    def __init__(self, form: str, softmax: bool) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(6, 18)
        self.table = nn.Parameter(torch.randn(5, 6))
        self.softmax = nn.Softmax(-1) if softmax else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = 0.4 * (q @ k.transpose(-1, -2))
        if self.form == "a layer beside the keys":  # in front of the product: W, not R
            scores = (q @ self.table.T @ self.table) @ k.transpose(-1, -2)
        else:
            term = F.pad(q @ self.table.transpose(-1, -2), [0, 1])[..., :5]
            scores = term if self.form == "a router" else scores + term.reshape(scores.shape)
        if self.form == "no softmax":
            return scores @ v
        scores = scores.softmax(-1) if self.softmax is None else self.softmax(scores)
        return scores @ v


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    ("form", "decays"),
    [("positions", False), ("a router", True), ("no softmax", True),
     ("a layer beside the keys", True)],
)  # fmt: skip
def test_relative_positions_that_queries_meet_do_not_decay(
    form: str, decays: bool, softmax: bool
) -> None:
    model = Attention(form, softmax)
    assert model(torch.randn(2, 5, 6)).shape == (2, 5, 6)
    assert ("table" in _decayed(model)) == decays and "qkv.weight" in _decayed(model)


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
    with pytest.raises(OptionError):
        normalized_decay(0.05, 0, 10, 1)
