"""The maps of streams: orthogonal, seeded, and applied as their matrices say."""

from __future__ import annotations

import pytest
import torch

from rewrite.errors import CheckpointError
from rewrite.observe.stream_matrices import paley, stream_map


@pytest.mark.parametrize("order", [4, 12, 20, 24, 28, 36, 44, 60, 76])
def test_paley_gives_hadamard_matrices(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None and set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [10, 52, 92 // 2])
def test_paley_has_no_matrix_of_some_orders(order: int) -> None:
    assert paley(order) is None


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("size", [1, 2, 6, 24, 37, 48, 64, 100, 384])
def test_maps_are_orthogonal_and_inverted_by_their_transpose(kind: str, size: int) -> None:
    spec = {"kind": kind, "size": size, "seed": 3}
    matrix = stream_map(spec).matrix()
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, eye, atol=1e-13)
    assert torch.allclose(stream_map({**spec, "inverse": True}).matrix(), matrix.T, atol=1e-14)
    rows = torch.randn(5, size, dtype=torch.float64)
    assert torch.allclose(stream_map(spec)(rows), rows @ matrix, atol=1e-13)


@pytest.mark.parametrize("size", [32, 48, 384, 1024])
def test_a_hadamard_map_spreads_each_channel_evenly(size: int) -> None:
    matrix = stream_map({"kind": "hadamard", "size": size}).matrix()
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-14)


def test_a_seed_is_the_matrix() -> None:
    one, same, other = (
        stream_map({"kind": "orthogonal", "size": 8, "seed": seed}).matrix() for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_centring_is_a_projection() -> None:
    matrix = stream_map({"kind": "centre", "size": 8}).matrix()
    assert torch.allclose(matrix @ matrix, matrix)
    assert torch.allclose(matrix.sum(0), torch.zeros(8, dtype=torch.float64), atol=1e-15)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="walsh"):
        stream_map({"kind": "walsh", "size": 8})
