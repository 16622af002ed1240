"""Square roots of symmetric matrices, and eigenvectors that do not depend on who computes them."""

from __future__ import annotations

import torch

from rewrite.grouping.linalg import eigenvectors, square_roots


def positive(seed: int) -> torch.Tensor:
    """Return two symmetric positive matrices."""
    torch.manual_seed(seed)
    a = torch.randn(2, 5, 5, dtype=torch.float64)
    return a @ a.mT + torch.eye(5, dtype=torch.float64)


def test_roots_square_to_the_matrix_and_undo_each_other() -> None:
    matrix = positive(0)
    root, inverse = square_roots(matrix, 1e-12)
    assert (root @ root - matrix).abs().max() < 1e-12
    assert (root @ inverse - torch.eye(5, dtype=torch.float64)).abs().max() < 1e-12
    assert (root @ root @ inverse - matrix).abs().max() > 1e-3


def test_a_floor_keeps_the_inverse_finite() -> None:
    singular = torch.ones(3, 3, dtype=torch.float64)
    _, inverse = square_roots(singular, 1e-4)
    assert torch.isfinite(inverse).all() and inverse.abs().max() <= 100 + 1e-9


def test_the_largest_entry_of_an_eigenvector_is_positive() -> None:
    matrix = positive(1)
    vectors = eigenvectors(matrix)
    values = (vectors.mT @ matrix @ vectors).diagonal(dim1=-2, dim2=-1)
    assert (matrix @ vectors - vectors * values[..., None, :]).abs().max() < 1e-12
    assert (values.diff(dim=-1) > 0).all()
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()
