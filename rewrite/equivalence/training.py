"""Compare two models in training mode: outputs, running statistics and gradients.

    loss(x) = sum_i <r_i, f(x)_i>       r_i random, so that gradients do not cancel by symmetry
    equal:  d loss / d x,  d loss / d p  for every parameter p that both models have by name

Parameters that a rewrite renamed (g and v of weight norm) have no counterpart; their effect shows
in the gradients of the inputs and of all parameters before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.equivalence.compare import compare
from rewrite.equivalence.variations import with_batch
from rewrite.equivalence.verification import Case
from rewrite.errors import one_line
from rewrite.runtime.inputs import Inputs, seeded
from rewrite.runtime.leaves import tensors
from rewrite.runtime.modes import widen

# A gradient that is zero but for rounding (of a bias before a batch norm) has no scale of its own:
# it is measured against this share of the largest gradient.
_FLOOR = 1e-3


@dataclass(frozen=True)
class _Pass:
    """The tensors of one forward and backward pass, by name."""

    output: Any
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def judge_training(
    a: nn.Module, b: nn.Module, inputs: Inputs, tolerance: float, seed: int
) -> Iterator[tuple[Case, list[str]]]:
    """Compare gradients in eval mode, then outputs, buffers and gradients in train mode.

    Yields each case and the reasons why it fails. The models are in float64 already; the caller
    restores their modes.
    """
    generator = torch.Generator().manual_seed(seed)
    # Batch statistics need more than one sample.
    wide = (with_batch(inputs, 2, generator) or inputs).map(widen)
    for name, training in (("gradients", False), ("train mode", True)):
        for model in (a, b):
            model.train(training)
        try:
            before = _run(a, wide, seed)
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            why = f"the original refuses it: {one_line(error)}"
            yield Case(name, str(wide), skipped=why), []
            continue
        try:
            after = _run(b, wide, seed)
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            why = f"{name}: the rewritten model fails: {one_line(error)}"
            yield Case(name, str(wide), failed=True), [why]
            continue
        yield _judge(name, str(wide), before, after, tolerance)


def _judge(
    name: str, inputs: str, before: _Pass, after: _Pass, tolerance: float
) -> tuple[Case, list[str]]:
    shared = [
        key
        for key, old in before.gradients.items()
        if key in after.gradients
        and (
            old is None
            or after.gradients[key] is None
            or _shape(old) == _shape(after.gradients[key])
        )
    ]
    pairs: dict[str, tuple[Any, Any]] = {f"{name}: output": (before.output, after.output)}
    for key in shared:
        old, new = before.gradients[key], after.gradients[key]
        pairs[f"{name}: gradient of {key}"] = (old, new)
    for key in before.buffers.keys() & after.buffers.keys():
        if before.buffers[key].shape == after.buffers[key].shape:
            pairs[f"{name}: buffer {key}"] = (before.buffers[key], after.buffers[key])
    floor = _FLOOR * max((_magnitude(g) for g in before.gradients.values()), default=0.0)
    reasons, worst_abs, worst_rel = [], 0.0, 0.0
    for where, (old, new) in pairs.items():
        if "gradient of" in where:
            old, new = _zero_if_none(old, new), _zero_if_none(new, old)
        found = compare(old, new)
        relative = found.max_rel
        if "gradient of" in where and floor > _magnitude(old):
            relative = found.max_abs / floor
        reasons += [f"{where}: {reason}" for reason in found.reasons]
        if relative > tolerance:
            reasons.append(f"{where} differs by {relative:.1e} relative in float64")
        worst_abs, worst_rel = max(worst_abs, found.max_abs), max(worst_rel, relative)
    return Case(name, inputs, worst_abs, worst_rel, failed=bool(reasons)), reasons


def _run(model: nn.Module, inputs: Inputs, seed: int) -> _Pass:
    own = inputs.clone().map(_watched)
    leaves = {f"input {i}": t for i, t in enumerate(_inputs(own)) if t.requires_grad}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    with seeded(seed), torch.enable_grad():
        output = model(*own.args, **own.kwargs)
        loss = _loss([t for t in tensors(output) if t.is_floating_point()], seed)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    # Buffers go on to be written: this is what they hold now.
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return _Pass(output, dict(zip(leaves, gradients, strict=True)), buffers)


def _loss(outputs: list[torch.Tensor], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total.to(output.device) + (output * weights.to(output.device)).sum()
    return total


def _inputs(inputs: Inputs) -> list[torch.Tensor]:
    return tensors([inputs.args, dict(inputs.kwargs)])


def _watched(leaf: Any) -> Any:
    watch = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.requires_grad_() if watch else leaf


def _magnitude(value: torch.Tensor | None) -> float:
    return float(value.abs().max()) if value is not None and value.numel() else 0.0


def _shape(value: torch.Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _zero_if_none(value: Any, like: Any) -> Any:
    return torch.zeros_like(like) if value is None and like is not None else value
