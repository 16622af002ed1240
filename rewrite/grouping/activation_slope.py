"""The mean slope of the activation behind a norm: the share of a small error that passes it.

    s_c = E f'(y_c),   y_c = β_c + γ_c t,   t standard normal

A normalized channel has mean β and standard deviation γ, so no data is needed; and no derivative,
since E f'(β + γ t) = E[t f(β + γ t)] / γ (Stein 1981, https://doi.org/10.1214/aos/1176345632).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.graph.operators import Activation, activation_of

_POINTS = 256


_LEAST = 1e-2
"""Standard deviation that a channel is taken to have at least, and the least share."""


def activation_slope(captured: Captured, norm: Node, scale: Tensor, bias: Tensor) -> Tensor:
    """Return s, (C,), float64 on the CPU: ones where no single activation reads the norm.

    Args:
        captured: the captured model.
        norm: a call of the norm.
        scale, bias: γ and β, float64.
    """
    function = _function(captured, norm)
    if function is None or scale.is_meta:
        return torch.ones(len(scale), dtype=torch.float64)
    points = torch.special.ndtri((torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS)[
        :, None
    ]
    spread = scale.cpu().abs().clamp(min=_LEAST)
    values = function((bias.cpu() + spread * points).to(scale.device)).cpu()
    share: Tensor = (points * values).mean(0) / (spread * (points**2).mean())
    return share.abs().clamp(min=_LEAST)


def _function(captured: Captured, norm: Node) -> Callable[[Tensor], Tensor] | None:
    readers = captured.readers(norm)
    if not readers.known or len(norm.users) != 1:
        return None
    activation = activation_of(captured, next(iter(norm.users)))
    if activation is None or not activation.by_value:
        return None
    others = [node for node in activation.node.all_input_nodes if node is not norm]
    return None if others else lambda values: _call(captured, activation, values)


def _call(captured: Captured, activation: Activation, values: Tensor) -> Tensor:
    node = activation.node

    def given(argument: object) -> object:
        return values if argument is activation.input else argument

    args = [given(argument) for argument in node.args]
    kwargs = {key: given(argument) for key, argument in node.kwargs.items()}
    if node.op == "call_module":
        result = captured.module(str(node.target))(*args, **kwargs)
    elif node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        result = node.target(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result
