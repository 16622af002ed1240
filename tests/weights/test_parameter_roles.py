"""What a parameter is: a matrix of a layer, or anything else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewrite import parameter_groups
from tests.training.test_parameter_groups import Disguised, Tokens, _decayed


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


class Gained(nn.Module):
    """Matrices with gains of other shapes: what is multiplied into a matrix is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8, 1))
        self.kernel = nn.Parameter(torch.randn(8, 8, 3))
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.heads = nn.Parameter(torch.ones(8))
        self.mixed = nn.Parameter(torch.randn(8, 8))
        self.classes = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.v * (self.g / self.v.norm(dim=1, keepdim=True)))
        kernel = (self.kernel - self.kernel.mean((1, 2), keepdim=True)) * self.gain
        x = F.conv1d(x[..., None], kernel, padding=1)[..., 0]
        x = torch.einsum("nd,d->nd", x, self.heads)
        x = torch.einsum("nd,de->ne", x, self.mixed)
        return F.normalize(x, dim=-1) @ F.normalize(self.classes, dim=-1).T


class GainedOpaque(nn.Module):
    """The same words in a forward that no trace follows, with another word for `self`."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.ones(8))
        self.mixed = nn.Parameter(torch.randn(8, 8))

    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        if x.sum() > 0:
            x = torch.einsum("nd,d->nd", x, this.heads)
        return torch.einsum("nd,de->ne", x, this.mixed)


def test_gains_of_matrices_do_not_decay() -> None:
    assert Gained()(torch.randn(2, 8)).shape == (2, 5)
    assert _decayed(Gained()) == {"v", "kernel", "mixed", "classes"}
    assert _decayed(GainedOpaque()) == {"mixed"}


class LowRank(nn.Module):
    """A frozen layer and what adapts it: x Aᵀ Bᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))
        self.shift = nn.Parameter(torch.zeros(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.mT + self.shift.T


def test_a_matrix_that_is_turned_by_an_attribute_decays() -> None:
    assert _decayed(LowRank()) == {"a", "b"}


class Untraced(Tokens):
    """Words and positions in a forward that no trace follows."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.sum() > 0:
            ids = ids + 1
        places = torch.arange(ids.shape[1])
        return self.words(ids) + self.places(places)


class NotPadding(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        mask = ids.ne(0).int()
        places = torch.cumsum(mask, 1) * mask
        return self.words(ids) + self.places(places.long())


@pytest.mark.parametrize("kind", [Untraced, NotPadding])
def test_positions_that_are_computed_do_not_decay(kind: type[nn.Module]) -> None:
    assert kind()(torch.ones(2, 3, dtype=torch.long)).shape == (2, 3, 4)
    assert _decayed(kind()) == {"words.weight"}
    swapped = kind()
    swapped.words, swapped.places = swapped.places, swapped.words
    assert _decayed(swapped) == {"words.weight"}  # its name is not what says it


class OneHotTable(nn.Module):
    """MaxViT's table of relative positions: rearranged by one-hot buffers, added to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.inner = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4, 4))
        self.rows = nn.Buffer(F.one_hot(torch.arange(4), 5).float())
        self.fixed = nn.Buffer(torch.randn(4, 4))
        self.word = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        table = torch.einsum("ij,jk->ik", self.rows, self.places) @ torch.ones(3, 4)
        logits = x @ x.mT + table
        words = F.one_hot(ids, 5).float() @ self.word
        return logits.softmax(-1) @ x @ (self.fixed @ self.inner) + words.sum(-1, keepdim=True)


def test_a_table_that_buffers_rearrange_is_no_matrix() -> None:
    """Its negative twins: a matrix behind a fixed one, and one that rows of the input pick from."""
    assert _decayed(OneHotTable()) == {"inner", "word"}


class GatesOfABranch(nn.Module):
    """RecurrentGemma's gates, whose forward no trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.kernel = (
            nn.Parameter(torch.randn(2, 3)),
            nn.Parameter(torch.randn(2, 4, 3)),
        )
        self.base, self.out = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = torch.baddbmm(self.shift[:, None], x, self.kernel)
        return torch.addmm(input=self.base, mat1=x[0], mat2=self.out.t())


def test_what_is_added_to_a_product_is_no_matrix() -> None:
    assert _decayed(GatesOfABranch()) == {"kernel", "out"}


class Queries(nn.Module):
    """DETR's queries, a table that is resized, an output layer, words; no trace follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.places = nn.Embedding(4, 4), nn.Embedding(4, 4)
        self.out, self.words, self.both = (nn.Embedding(4, 4) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.sum() < 0:
            return self.queries.weight
        x = F.embedding(ids, self.words.weight) + self.both(ids) + self.both.weight.mean(0)
        x = x + self.queries.weight.repeat(1, 1)
        return (x + self.places.weight.reshape(2, 8).view(4, 4)) @ self.out.weight.t()


def test_an_embedding_that_is_read_whole_is_a_parameter_like_any_other() -> None:
    assert _decayed(Queries()) == {"out.weight", "words.weight", "both.weight"}
