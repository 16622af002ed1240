"""Draw one weight by a scheme, seeded, for its true fans and layout."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.weights.fans import LinearMap

if TYPE_CHECKING:
    from rewrite.init.schemes import Scheme


# -- drawing -------------------------------------------------------------------------------------


def generator(seed: int, name: str) -> torch.Generator:
    """Return the random stream of one weight: of `seed` and `name`, and of nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def refusal(scheme: Scheme, linear_map: LinearMap | None, shape: torch.Size) -> str | None:
    """Return why `scheme` cannot fill a weight of this shape, or None if it can."""
    if linear_map is None:
        if scheme.needs_fans:
            return (
                f"{scheme.family} needs a linear map, and this is a free parameter; name it with "
                "trunc_normal, normal or zeros"
            )
        return None
    if scheme.family == "orthogonal" and (len(shape) < 2 or math.prod(shape) == 0):
        return f"orthogonal needs rows and columns, and the shape is {tuple(shape)}"
    if scheme.family == "dirac" and len(shape) < 3:
        return f"dirac needs a convolution's kernel, and the shape is {tuple(shape)}"
    if scheme.needs_fans and min(linear_map.fan_in, linear_map.fan_out) <= 0:
        return f"{scheme.family} needs inputs and outputs, and the shape is {tuple(shape)}"
    return None


def draw(
    scheme: Scheme,
    linear_map: LinearMap | None,
    shape: torch.Size,
    random: torch.Generator,
    following: float = 1.0,
) -> torch.Tensor:
    """Return a float64 tensor of `shape` filled by `scheme`; `following` is the graph's gain.

    Raises:
        OptionError: the scheme is not defined for this shape.
    """
    if (reason := refusal(scheme, linear_map, shape)) is not None:
        raise OptionError(reason)
    empty = torch.zeros(shape, dtype=torch.float64)
    if scheme.family == "zeros":
        return empty
    if scheme.family == "normal":
        return empty.normal_(0, scheme.std(1, 1), generator=random)
    if scheme.family == "trunc_normal":
        nn.init.trunc_normal_(empty, 0, scheme.std(1, 1), generator=random)
        return empty
    assert linear_map is not None  # `refusal` has seen to it
    units = linear_map.layout.units(empty)
    if scheme.family == "orthogonal":
        return linear_map.layout.weight(_orthogonal(units, random) * scheme.gain(following))
    if scheme.family == "dirac":
        return linear_map.layout.weight(_dirac(units))
    std = scheme.std(linear_map.fan_in, linear_map.fan_out, following)
    if scheme.distribution == "normal":
        filled = torch.randn(units.shape, dtype=torch.float64, generator=random) * std
    else:
        filled = torch.rand(units.shape, dtype=torch.float64, generator=random)
        filled = (2 * filled - 1) * (math.sqrt(3.0) * std)
    return linear_map.layout.weight(filled)


def _orthogonal(units: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    groups, outputs = units.shape[:2]
    columns = math.prod(units.shape[2:])
    tall = torch.randn(
        groups, max(outputs, columns), min(outputs, columns), dtype=torch.float64, generator=random
    )
    q, r = torch.linalg.qr(tall)
    # Signs of the diagonal make the draw uniform over the orthogonal group.
    q = q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    rows: torch.Tensor = q if outputs >= columns else q.mT
    return rows.reshape(units.shape)


def _dirac(units: torch.Tensor) -> torch.Tensor:
    filled = torch.zeros_like(units)
    centre = filled
    for size in units.shape[3:]:
        centre = centre.select(3, size // 2)
    centre.diagonal(dim1=1, dim2=2).fill_(1.0)
    return filled
