"""Parameter groups for an optimizer: weight decay for the matrices of layers, none for the rest.

    decayed      w ← w − η (∇L + λ w)    weights of layers, whatever they are called
    not decayed  w ← w − η ∇L            norms, biases, scales, tables, tokens

Goyal et al. 2017 (https://arxiv.org/abs/1706.02677), §5.3, leave γ and β of the norms out;
Loshchilov & Hutter 2019 (https://arxiv.org/abs/1711.05101) normalize λ by the length of a training:
λ = λ_n √(b / (B T)) for batch size b, B samples and T epochs.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rewrite.errors import OptionError
from rewrite.runtime.tree import Tree, join
from rewrite.weights.parameter_roles import Role, roles


def parameter_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Return what an optimizer of `torch.optim` takes: the parameters in two groups.

    Args:
        model: any module. Parameters are classified by their use in its graph, not by their
            names; it is neither run nor changed.
        weight_decay: λ of the first group, 0 or more.

    Returns:
        Two dicts with `params`, `names` (the first qualified name of each) and `weight_decay`: the
        weights of layers, and everything else with 0. Each trainable parameter is in one of them
        once, frozen ones in none.

    Raises:
        OptionError: weight_decay is negative or not finite.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise OptionError(f"weight_decay is {weight_decay}; pass a finite number, 0 or more")
    found = roles(model)
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": decay} for decay in (weight_decay, 0.0)
    ]
    for name, module in Tree(model).modules():
        for key, parameter in module._parameters.items():
            full = join(name, key)
            if parameter is None or not parameter.requires_grad or full not in found:
                continue
            group = groups[0 if found[full] is Role.MATRIX else 1]
            group["params"].append(parameter)
            group["names"].append(full)
    return groups


def normalized_decay(decay: float, batch_size: int, samples: int, epochs: float) -> float:
    """Return the weight decay of a training from a normalized one: λ = λ_n √(b / (B T)).

    Args:
        decay: λ_n.
        batch_size: b, samples a step.
        samples: B, how many the training set has.
        epochs: T, passes over it.

    Raises:
        OptionError: a size is not positive, or the decay negative.
    """
    if not (decay >= 0 and batch_size >= 1 and samples >= 1 and epochs > 0):
        raise OptionError(
            f"normalized decay {decay} of batch size {batch_size}, {samples} samples, "
            f"{epochs} epochs: pass positive numbers"
        )
    return decay * math.sqrt(batch_size / (samples * epochs))
