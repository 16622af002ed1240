"""Symmetric matrices: square roots, and eigenvectors on which all processes agree."""

from __future__ import annotations

import torch
from torch import Tensor


def square_roots(matrix: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return H and H⁻¹ with H² = `matrix`, (*, C, C).

    Args:
        matrix: symmetric, (*, C, C).
        floor: what an eigenvalue is at least, a number or (*, 1).
    """
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=floor).sqrt()[..., None, :]
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT


def eigenvectors(matrix: Tensor) -> Tensor:
    """Return the eigenvectors as columns, their eigenvalues rising, (*, C, C).

    An eigenvector is as good as its negative: here its largest entry is positive.
    """
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sign()
