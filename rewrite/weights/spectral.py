"""The vectors of a spectral norm, for a weight that was exchanged.

    w / sigma,   sigma = u^T W v        u, v the first singular vectors of W

A spectral norm keeps u and v and moves them one power iteration a training step; after a new weight
they are those of the old one, and sigma is nothing (pytorch/pytorch#25092). Here they come from an
eigendecomposition of the smaller of W W^T and W^T W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm

from rewrite.graph.tensor_writer import TensorWriter

_LARGE = 3000
"""From this many rows and columns on the vectors are found by power iterations."""


_ITERATIONS = 300


_SETTLED = 1e-6


def leading_vectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first left and right singular vectors of a matrix, in its dtype."""
    wide = matrix.detach().to(torch.float64)
    rows, columns = wide.shape
    gram = wide @ wide.T if rows <= columns else wide.T @ wide
    if len(gram) <= _LARGE:
        first = torch.linalg.eigh(gram).eigenvectors[:, -1]
    else:
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(len(gram), generator=generator, dtype=torch.float64).to(gram.device)
        for _ in range(_ITERATIONS):
            first = nn.functional.normalize(gram @ first, dim=0)
    second = nn.functional.normalize((wide.T if rows <= columns else wide) @ first, dim=0)
    u, v = (first, second) if rows <= columns else (second, first)
    return u.to(matrix.dtype), v.to(matrix.dtype)


def refresh_old_spectral_norm(
    writer: TensorWriter, module: nn.Module, hook: OldSpectralNorm
) -> None:
    """Give an old-style spectral norm the vectors of the weight that it now has."""
    matrix = hook.reshape_weight_to_matrix(getattr(module, f"{hook.name}_orig"))
    u, v = leading_vectors(matrix)
    writer.write(module, f"{hook.name}_u", u)
    writer.write(module, f"{hook.name}_v", v)


def refresh_chain(writer: TensorWriter, module: nn.Module, name: str) -> None:
    """Bring the state of a weight's parametrizations up to date with what they now read.

    Where one is no spectral norm and keeps buffers, the weight is read in train mode, as training
    does, until it stays.
    """
    chain: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict, for nn.Module a Tensor or a Module
    unknown = [s for s in chain if not isinstance(s, _SpectralNorm) and list(s.buffers())]
    if unknown:
        _settle(module, name, chain)
    modes = [(step, step.training) for step in chain.modules()]
    chain.eval()
    try:
        count = sum(key.startswith("original") for key in chain._parameters)
        sources = (
            [chain.original]
            if hasattr(chain, "original")
            else [getattr(chain, f"original{index}") for index in range(count)]
        )
        for step in chain:
            if isinstance(step, _SpectralNorm) and sources[0].ndim > 1:
                u, v = leading_vectors(step._reshape_weight_to_matrix(sources[0]))
                writer.write(step, "_u", u)
                writer.write(step, "_v", v)
            sources = [step(*sources)]
    finally:
        for step, training in modes:
            step.training = training


def _settle(module: nn.Module, name: str, chain: Any) -> None:
    modes = [(step, step.training) for step in chain.modules()]
    chain.train()
    try:
        before = getattr(module, name).clone()
        for _ in range(_ITERATIONS):
            now = getattr(module, name).clone()
            if float((now - before).norm()) <= _SETTLED * float(now.norm()):
                return
            before = now
    finally:
        for step, training in modes:
            step.training = training
