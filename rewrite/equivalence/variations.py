"""Vary an example input to expose errors: other values, order, batch sizes and image sizes.

Two models that agree on one random batch may differ on another: a single scale hides eps, batch
size 1 hides a mixed-up batch axis, a single spatial size hides a shape that became a constant. Each
variation changes one thing:

    value   normal x {1, 0.1, 10}, uniform, zeros, ones, tiny (1e-6), large (1e3), one impulse
    batch   1, 2, 7
    space   another height and width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rewrite.runtime.leaves import tensors

if TYPE_CHECKING:
    from rewrite.runtime.inputs import Inputs


BATCH_SIZES = (1, 2, 7)


_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal x 0.1": lambda noise: 0.1 * noise,
    "normal x 10": lambda noise: 10 * noise,
    "uniform": lambda noise: (noise.abs() / 3).clamp(max=1),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "tiny": lambda noise: 1e-6 * noise,
    "large": lambda noise: 1e3 * noise,
    "impulse": lambda noise: _impulse(noise),
}


def adversarial(inputs: Inputs, seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """Yield named variations of `inputs`: of value, of batch size, of spatial size.

    Values are varied at batch size 1, to save time on large examples. A model may reject a
    variation; the caller leaves it out then.
    """
    generator = torch.Generator().manual_seed(seed)
    single = with_batch(inputs, 1, generator) or inputs
    floating = any(t.is_floating_point() for t in tensors([inputs.args, dict(inputs.kwargs)]))
    for name, values in _VALUES.items() if floating else ():
        yield name, single.map(partial(_revalued, values=values, generator=generator))
    if not floating:
        yield "other indices", single.map(lambda leaf: _shuffled(leaf, generator))
    for size in BATCH_SIZES:
        varied = with_batch(inputs, size, generator)
        if varied is not None:
            yield f"batch of {size}", varied
    for name, scale in (("smaller", 0.5), ("larger", 1.5)):
        resized = _with_space(single, scale, generator)
        if resized is not None:
            yield f"{name} ({resized})", resized


def _impulse(noise: torch.Tensor) -> torch.Tensor:
    """Return zeros with a single one off the center, which reveals axes, flips and padding."""
    value = torch.zeros_like(noise)
    if value.numel():
        value.view(-1)[value.numel() // 3] = 1
    return value


def _noise(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _revalued(
    leaf: Any, *, values: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator
) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return values(_noise(tuple(leaf.shape), leaf, generator).contiguous())


def _shuffled(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.dtype not in (torch.int64, torch.int32):
        return leaf
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return leaf.reshape(-1)[order].view(leaf.shape)


def _batched(inputs: Inputs) -> int | None:
    """Return the size of the first axis, if it is the same in all tensors."""
    sizes = {t.shape[0] if t.ndim else None for t in tensors([inputs.args, dict(inputs.kwargs)])}
    return sizes.pop() if len(sizes) == 1 else None


def with_batch(inputs: Inputs, size: int, generator: torch.Generator) -> Inputs | None:
    """Return random inputs of another batch size, or None where there is no batch axis."""
    if not _batched(inputs):
        return None
    return inputs.map(
        lambda leaf: (
            _resized(leaf, (size, *leaf.shape[1:]), generator)
            if isinstance(leaf, torch.Tensor)
            else leaf
        )
    )


def _with_space(inputs: Inputs, scale: float, generator: torch.Generator) -> Inputs | None:
    """Scale the last two axes of every image, to multiples of 32 if the example's are."""

    def side(length: int) -> int:
        step = 32 if length % 32 == 0 else 1
        return max(step, round(length * scale / step) * step)

    def varied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim != 4 or not leaf.is_floating_point():
            return leaf
        return _resized(leaf, (*leaf.shape[:2], *map(side, leaf.shape[2:])), generator)

    resized = inputs.map(varied)
    return None if str(resized) == str(inputs) else resized


def _resized(
    leaf: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    if leaf.is_floating_point():
        return _noise(shape, leaf, generator)
    repeats = -(-shape[0] // max(1, leaf.shape[0]))
    return leaf.repeat(repeats, *(1 for _ in shape[1:]))[: shape[0]].clone()
