"""Estimate how rounding stored parameters to their dtype changes a model's values.

A rewrite computes in float64 and stores in the model's own dtype, so each parameter that it wrote
has an error of up to half a unit in the last place. How much of a difference this explains is
measured on the original:

    S(x) = | f(x; p) - f(x; p (1 + u)) |      u = +-eps/2 at random, p the parameters that changed

with eps of the stored dtype. A model stored in float64 gets no allowance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rewrite.runtime.tree import Tree

EXPLAINS = 8.0
"""How many times its own measure the rounding of parameters explains: draws of one distribution."""


_SIGNS = 1_048_583


_CHOSEN_BITS = 6
"""A number of at most so many bits is a choice (1, 0.5, -3), not the result of rounding."""


_LOOKED_AT = 1000
"""One number that nobody chose among the first so many tells of a whole tensor."""


_SENTINEL = 1e30
"""From here on a number stands for infinity, as in a mask."""


def stored_rounding(a: nn.Module, b: nn.Module) -> dict[tuple[str, str], float]:
    """Return the eps of each tensor of `a` that differs in `b` and is narrower than float64.

    By the qualified name of the module and the name of the tensor in it.
    """
    old, new = Tree(a), Tree(b)
    changed = {}
    for name, module in old.modules():
        other = new.names.get(name)
        theirs = {} if other is None else {**other._parameters, **other._buffers}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
                continue
            if not identical(tensor, theirs.get(key)):
                changed[name, key] = torch.finfo(tensor.dtype).eps
    return changed


def all_rounding(model: nn.Module) -> dict[tuple[str, str], float]:
    """Return the eps of every floating-point tensor of a model that is narrower than float64."""
    return {
        (name, key): torch.finfo(tensor.dtype).eps
        for name, module in Tree(model).modules()
        for key, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    }


def identical(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Return whether two tensors have equal dtype and values, NaN equal to NaN."""
    if a is None or b is None:
        return a is b
    if is_lazy(a) or is_lazy(b):
        return is_lazy(a) and is_lazy(b)  # neither has a shape
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta  # neither has values
    if torch.equal(a, b):
        return True
    # NaN is not equal to itself; bits are.
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextlib.contextmanager
def perturbed(
    model: nn.Module, eps: Mapping[tuple[str, str], float] | None, seed: int
) -> Iterator[None]:
    """Perturb tensors of `model` by a relative ± eps / 2 while the context is open.

    `eps` is by module and tensor; None perturbs every parameter by the eps of float64.
    """
    nudge = Perturbation(seed)
    tree = Tree(model)
    saved = [(m, dict(m._parameters), dict(m._buffers)) for _, m in tree.modules()]
    double = torch.finfo(torch.float64).eps
    try:
        for name, module in tree.modules():
            for held in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for key, tensor in held.items():
                    size = 2 * double if eps is None else eps.get((name, key))
                    if size is not None and tensor is not None and tensor.is_floating_point():
                        held[key] = nudge(tensor, size)
        yield
    finally:
        for module, parameters, buffers in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


class Perturbation:
    """Perturbs tensors by a relative ± eps / 2, at random.

    A prime number of signs is drawn once and used cyclically from tensor to tensor, so that the
    rows of a weight, and weights of equal shape, get different signs.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.empty(_SIGNS, dtype=torch.float64).bernoulli_(0.5, generator=generator)
        self._at = 0

    def stored(self, tensor: torch.Tensor, *, fills: bool = True) -> torch.Tensor:
        """Return a float tensor as it may have been before it was rounded to its dtype.

        Values that were chosen, not computed, are exact and stay: scalars of few bits, masks,
        numbers that stand for infinity. A tensor filled with one value (the weight of a fresh norm)
        may be either; it is perturbed if `fills`.
        """
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if largest < _SENTINEL and not bool(_chosen(tensor.reshape(-1)[:_LOOKED_AT]).all()):
            return self(tensor, torch.finfo(tensor.dtype).eps)
        plain = tensor.isfinite() & (tensor.abs() < _SENTINEL)
        chosen = _chosen(tensor) | ~plain
        if bool(chosen.all()):
            filled = tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())
            if not (fills and filled and bool(plain.all())):
                return tensor
        return torch.where(plain, self(tensor, torch.finfo(tensor.dtype).eps), tensor)

    def __call__(self, tensor: torch.Tensor, eps: float) -> torch.Tensor:
        """Return `tensor` with each element larger or smaller by a relative `eps` / 2."""
        source = tensor.detach()
        moved = torch.empty_like(source)  # has no gaps
        if moved.stride() != source.stride():
            source = source.contiguous()
            moved = torch.empty_like(source)
        flat, given = (t.as_strided((t.numel(),), (1,)) for t in (moved, source))
        begin = 0
        while begin < flat.numel():
            size = min(flat.numel() - begin, _SIGNS - self._at)
            step = self._signs[self._at : self._at + size] * eps + (1 - eps / 2)
            part = given[begin : begin + size]
            flat[begin : begin + size] = step.to(part.device).mul_(part)
            begin += size
            self._at = (self._at + size) % _SIGNS
        parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(moved, tensor.requires_grad) if parameter else moved


def _chosen(tensor: torch.Tensor) -> torch.Tensor:
    """Return a mask of the elements that are integers or have few significant bits."""
    wide = tensor.detach().to(torch.float64)
    mantissa = torch.frexp(wide).mantissa * 2**_CHOSEN_BITS
    whole: torch.Tensor = (wide == wide.round()) | (mantissa == mantissa.round())
    return whole
