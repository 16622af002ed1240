"""Find the axis of each input that is the batch, by running the model at other sizes of it.

    x (B, C, H, W)                           axis 0
    x (B, T, F), h (L, B, H), c (L, B, H)    axes 0, 1, 1: an LSTM with batch_first and its states
    x (T, B, F), h (L, B, H)                 axes 1, 1

The candidates are axes of one size among the first two of every tensor; an assignment is right
where the model runs at two other sizes and its output follows. An input that stays as it is (a
table, a scalar) has none.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from rewrite.runtime.inputs import Inputs, call
from rewrite.runtime.leaves import tensors
from rewrite.runtime.modes import isolated

BATCH = "batch"


_TRIALS = 12
"""How many assignments of axes are tried."""


def find_batch_axes(
    model: nn.Module,
    inputs: Inputs,
    leaves: Sequence[torch.Tensor],
    taken: Sequence[frozenset[int]],
    seed: int,
) -> tuple[int | None, ...] | None:
    """Return the batch axis of each of `leaves`, the tensors among `inputs`; None without any.

    Axes that are `taken` are none of them.
    """
    shared = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    plain = all(0 not in axes for axes in taken) and None not in shared
    front = plain and len(shared) == 1 and 0 not in shared
    if not front or len(leaves) > 1:
        for axes in itertools.islice(_assignments(leaves, taken), _TRIALS):
            if _runs(model, inputs, leaves, axes, seed):
                return axes
    return tuple(0 for _ in leaves) if front else None


def _assignments(
    leaves: Sequence[torch.Tensor], taken: Sequence[frozenset[int]]
) -> Iterator[tuple[int | None, ...]]:
    """Yield assignments of an axis to each tensor, all of one size, those at the front first."""
    held_by = Counter(size for leaf in leaves for size in set(leaf.shape[:2]))
    # The batch is what the most tensors have; of axes alike the first.
    for size, _ in held_by.most_common():
        choices: list[list[int | None]] = []
        for leaf, held in zip(leaves, taken, strict=True):
            fit: list[int | None] = [
                axis
                for axis in (0, 1)
                if leaf.ndim > axis and leaf.shape[axis] == size and axis not in held
            ]
            choices.append(fit if len(fit) > 1 else [*fit, None])
        for axes in itertools.product(*choices):
            if any(axis is not None for axis in axes):
                yield axes


def _runs(
    model: nn.Module,
    inputs: Inputs,
    leaves: Sequence[torch.Tensor],
    axes: Sequence[int | None],
    seed: int,
) -> bool:
    """Return whether the model runs at two other sizes of these axes, and its output follows."""
    sizes = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
    size = sizes.pop()
    seen = []
    for other in (size + 1, size + 2):
        by_leaf = {
            id(leaf): {axis: other}
            for leaf, axis in zip(leaves, axes, strict=True)
            if axis is not None
        }
        found = None
        with contextlib.suppress(Exception), isolated(model):
            found = call(model, _repeated(inputs, by_leaf), seed)
        if found is None or not any(other in t.shape[:2] for t in tensors(found)):
            return False
        seen.append([tuple(t.shape) for t in tensors(found)])
    return seen[0] != seen[1]


def _repeated(inputs: Inputs, sizes: Mapping[int, Mapping[int, int]]) -> Inputs:
    """Return inputs with the tensors of these ids at other sizes, filled with their own rows."""

    def longer(leaf: Any) -> Any:
        for axis, size in sizes.get(id(leaf), {}).items():
            index = torch.arange(size, device=leaf.device) % leaf.shape[axis]
            leaf = leaf.index_select(axis, index)
        return leaf

    return inputs.map(longer)


def widened(inputs: Inputs, shapes: Mapping[str, Any]) -> Inputs:
    """Return inputs whose dynamic axes are two or longer: the exporter takes a 1 for a constant.

    `shapes` is by argument, in the order of `inputs`, with a dict of axes, or None, in the place of
    each tensor.
    """
    specs = tree_leaves(list(shapes.values()), is_leaf=lambda node: node is None or _is_spec(node))
    rest = iter(specs)

    def doubled(leaf: Any) -> Any:
        spec = next(rest) or {}
        for axis in spec:
            if isinstance(leaf, torch.Tensor) and leaf.shape[axis] == 1:
                leaf = torch.cat([leaf, leaf], axis)
        return leaf

    return Inputs(tree_map(doubled, inputs.args), tree_map(doubled, dict(inputs.kwargs)))


def _is_spec(node: Any) -> bool:
    return isinstance(node, dict) and bool(node) and all(isinstance(key, int) for key in node)
