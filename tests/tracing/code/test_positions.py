"""Which look-ups in the code of a class are by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.tracing.code.positions import looks_up_positions


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, 4)
        self.register_buffer("ids", torch.arange(8))
        self.register_buffer("same", torch.zeros(8, dtype=torch.long))
        self.register_buffer("real", torch.rand(8))
        self.offset = 2


class Counted(Held):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return x + self.places(torch.arange(n) + self.offset)


class Filled(Held):
    """An argument that may be left out, as transformers write it."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        if ids is None:
            ids = self.ids[: x.size(1)]
        ids = ids.unsqueeze(0).long()
        return x + self.places(ids)


class Padded(Held):
    """RoBERTa's: positions of what is not padding, made by another method."""

    def made(self, ids: Tensor, padding: int) -> Tensor:
        mask = ids.ne(padding).int()
        counted = torch.cumsum(mask, 1)
        counted = counted * mask
        return counted.long() + padding

    def forward(self, ids: Tensor) -> Tensor:
        return self.places(self.made(ids, padding=self.offset))


class Distances(Held):
    """T5's: how far each place is from each other one."""

    def buckets(self, distance: Tensor) -> Tensor:
        found = 0
        found += (distance > 0).long() * 2
        return found + torch.where(distance < 2, torch.abs(distance), 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1])
        return x @ self.places(self.buckets(rows[None] - rows[:, None])).sum(0)


class Words(Held):
    def forward(self, ids: Tensor) -> Tensor:
        return self.places(ids)


class Optional(Held):
    """What may be left out and is filled with nothing that counts."""

    def forward(self, x: Tensor, kinds: Tensor | None = None) -> Tensor:
        if kinds is None:
            kinds = torch.zeros_like(x[..., 0]) + self.same[:1]
        return x + self.places(kinds)


class Codebooks(Held):
    """Data, moved on by a place: one table of several codebooks."""

    def forward(self, codes: Tensor) -> Tensor:
        return self.places(codes + 4 * torch.arange(codes.shape[1]))


class Both(Counted):
    def words(self, ids: Tensor) -> Tensor:
        return self.places(ids)


class Real(Held):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.places(self.real.long())


@pytest.mark.parametrize("kind", [Counted, Filled, Padded, Distances])
def test_positions(kind: type[nn.Module]) -> None:
    assert looks_up_positions(kind(), "places")
    assert not looks_up_positions(kind(), "others")


@pytest.mark.parametrize("kind", [Words, Optional, Codebooks, Both, Real])
def test_data(kind: type[nn.Module]) -> None:
    assert not looks_up_positions(kind(), "places")


class Assigned(nn.Module):
    """CLIP's, and one whose kinds of tokens are all alike."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.places, self.kinds = nn.Embedding(length, 4), nn.Embedding(2, 4)
        counted = torch.arange(length)
        self.ids = nn.Buffer(counted.expand((1, -1)), persistent=False)
        self.same = nn.Buffer(torch.zeros(1, length, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return x + self.places(self.ids[:, :n]) + self.kinds(self.same[:, :n])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_without_values_are_read_in_the_constructor(device: str) -> None:
    with torch.device(device):
        filled, assigned, optional = Filled(), Assigned(8), Optional()
    assert looks_up_positions(filled, "places") and looks_up_positions(assigned, "places")
    assert not looks_up_positions(assigned, "kinds") and not looks_up_positions(optional, "places")


class Moved(nn.Module):
    """Buffers that are made of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(10, 4)
        self.register_buffer("counted", torch.arange(8))
        self.register_buffer("same", torch.zeros(8, dtype=torch.long))
        self.counted = self.counted + 1
        self.same = self.same + 1


class Moving(Moved):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.places(self.counted)


class Still(Moved):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.places(self.same)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_buffer_that_is_made_of_itself_is_what_it_was_first(device: str) -> None:
    with torch.device(device):
        moving, still = Moving(), Still()
    assert looks_up_positions(moving, "places") and not looks_up_positions(still, "places")


class Learned(nn.Embedding):
    """OPT's: made of the mask that comes."""

    def forward(self, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        if ids is None:
            ids = torch.cumsum(mask, 1)
            ids = (ids * mask - 1).long()
        return super().forward(ids + 2)


class Rows(nn.Embedding):
    """Whisper's: rows of its weight."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        return self.weight[: x.shape[1]] if ids is None else self.weight[ids]


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


def test_embeddings_with_a_forward_of_their_own() -> None:
    assert looks_up_positions(Learned(8, 4), "") and looks_up_positions(Rows(8, 4), "")
    assert not looks_up_positions(Scaled(8, 4), "") and not looks_up_positions(
        nn.Embedding(8, 4), ""
    )
