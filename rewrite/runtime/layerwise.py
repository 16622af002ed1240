"""One forward in which each layer is fitted before the next one sees its output.

    for each layer, in the order in which the forward calls them:
        y = layer(x)            with every earlier layer already fitted
        y' = fit(layer, y)      what the fitted layer returns for the same x
        the forward goes on with y'

So a whole network is fitted in one forward, also one that no tracer can follow: the order of calls
is the order of the data flow. A layer that is called again is fitted at its first call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rewrite.runtime.inputs import Inputs
from rewrite.runtime.modes import evaluating

FitFunction = Callable[[str, nn.Module, torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]


def fit_in_lockstep(
    model: nn.Module, batch: Any, layers: Mapping[str, nn.Module], fit: FitFunction
) -> tuple[str, ...]:
    """Run `batch` through `model` in eval mode, without gradients, fitting `layers` on the way.

    Args:
        model: the model; its modes are put back.
        batch: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        layers: the layers to fit, by name.
        fit: called with the name, the layer, its output and a function that computes the output
            anew; returns what the layer now returns.

    Returns:
        The names of the layers that the forward never called.
    """
    unreached = dict.fromkeys(layers)

    def hook_for(name: str) -> Callable[..., torch.Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> torch.Tensor | None:
            if name not in unreached or not isinstance(output, torch.Tensor):
                return None
            del unreached[name]
            return fit(name, module, output, lambda: module.forward(*args, **kwargs))

        return hook

    inputs = Inputs.of(batch)
    handles = [
        layer.register_forward_hook(hook_for(name), prepend=True, with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(unreached)
