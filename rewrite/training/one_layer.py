"""Per-sample gradients of any model: it is presented to Opacus as a single layer.

    θ_n = θ,        y_n = f(x_n; θ_n),        g_n = ∂L/∂θ_n        for every sample n

Opacus has one rule for each kind of layer, takes the first axis of a layer's input for the batch,
and rejects layers with buffers. Relative position tables (bare parameters with index buffers) and
attention over windows or heads (several rows per sample along the first axis) do not fit. Here the
only layer that it sees expands the parameters to one row per sample; the gradient of row n is the
gradient of sample n. So g_n is exact whatever the model computes, random numbers included: no
sample uses the parameters of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewrite.errors import OptionError
from rewrite.graph.capture import capture
from rewrite.graph.effects import Effects


class ParametersOfSamples(nn.Module):
    """A layer that expands a model's P trained numbers to one row per sample: (N, *) to (N, P).

    Parameters that are frozen when it is built are not part of the row.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {name.replace(".", "/"): name for name, _ in model.named_parameters()}
        for key, name in self.names.items():
            self.register_parameter(key, model.get_parameter(name))
        self.trained = [key for key in self.names if self.get_parameter(key).requires_grad]

    def forward(self, samples: Tensor) -> Tensor:
        """Return the trained parameters as (N, P), one row per sample of `samples` (N, *)."""
        row = torch.cat([getattr(self, key).flatten() for key in self.trained])
        return row.expand(len(samples), -1)

    def of(self, row: Tensor) -> dict[str, Tensor]:
        """Return all parameters by name, the trained ones as views of `row` (P,)."""
        given = self.shared()
        parts = torch.split(row, [given[self.names[key]].numel() for key in self.trained])
        for key, part in zip(self.trained, parts, strict=True):
            like = given[self.names[key]]
            given[self.names[key]] = part.view(like.shape).to(like.dtype)
        return given

    def shared(self) -> dict[str, Tensor]:
        """Return the parameters themselves by name."""
        return {name: self.get_parameter(key) for key, name in self.names.items()}


class AsOneLayer(nn.Module):
    """A model whose parameters appear as those of a single layer without buffers.

        private, optimizer, loader = PrivacyEngine().make_private(module=AsOneLayer(model), …)

    The parameters are shared with the model, not copied: training this trains the model. In train
    mode each sample runs alone, with its own row of parameters, whose gradients take N times the
    memory of the parameters. Opacus' modes "hooks" and "functorch" both work.

    Args:
        model: takes and returns tensors with the N samples along axis 0, in any nesting. No layer
            may mix samples or write to a buffer. Random numbers differ from sample to sample.
            Parameters that are frozen now stay frozen.
        vectorize: run all samples by one `torch.func.vmap` instead of a loop: for GPUs, which one
            sample does not fill. It is slower on a CPU, and `vmap` rejects some forwards.

    Raises:
        OptionError: a norm uses statistics of the batch, the forward writes to a buffer, or all
            parameters are frozen.
    """

    def __init__(self, model: nn.Module, *, vectorize: bool = False) -> None:
        super().__init__()
        self.vectorize = vectorize
        _check_samples_stay_apart(model)
        # In a list, or it would be a child, with all that it holds.
        self._held = [model]
        self.layer = ParametersOfSamples(model)
        if not self.layer.trained:
            raise OptionError("no parameter of the model requires a gradient")
        self.train(model.training)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for these samples.

        Raises:
            OptionError: the first axes of the inputs differ, or an output has no axis of samples.
        """
        if not (self.training and torch.is_grad_enabled()):
            return functional_call(self.model, self.layer.shared(), args, kwargs)
        given, nesting = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(given) if isinstance(leaf, Tensor)]
        count = _count_of_samples([given[place] for place in places])
        found: list[Any] = []

        def of_one(row: Tensor, *sample: Tensor) -> tuple[Tensor, ...]:
            for place, tensor in zip(places, sample, strict=True):
                given[place] = tensor[None]
            one_args, one_kwargs = tree_unflatten(given, nesting)
            output = functional_call(self.model, self.layer.of(row), one_args, one_kwargs)
            found[:] = tree_flatten(output)
            return tuple(leaf for leaf in found[0] if isinstance(leaf, Tensor))

        samples = [given[place] for place in places]
        rows = self.layer(samples[0].new_empty((count, 1), dtype=torch.float))
        if self.vectorize:
            outputs = vmap(of_one, randomness="different")(rows, *samples)
        else:
            each = [of_one(*one) for one in zip(rows, *samples, strict=True)]
            outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        parts = iter(outputs)
        joined = [_joined(next(parts)) if isinstance(x, Tensor) else _plain(x) for x in found[0]]
        return tree_unflatten(joined, found[1])

    def train(self, mode: bool = True) -> Self:
        """Set the mode, also that of the model."""
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers of the model with the parameters."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else fn(buffer)
        return self


def _count_of_samples(tensors: Sequence[Tensor]) -> int:
    """Return N, the length of axis 0 of every input."""
    counts = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    if len(counts) != 1 or None in counts:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"
        raise OptionError(f"the samples must lie along axis 0 of every input; found {shapes}")
    count: int = tensors[0].shape[0]
    return count


def _joined(output: Tensor) -> Tensor:
    """Return the outputs (N, k, *) of single samples as one batch (N k, *)."""
    if output.dim() < 2:
        raise OptionError(
            "the model returns a number for all samples together; return one for each sample"
        )
    return output.flatten(0, 1)


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, str | int | float | bool | None):
        raise OptionError(f"the model returns a {type(leaf).__name__}; return tensors only")
    return leaf


def _check_samples_stay_apart(model: nn.Module) -> None:
    for name, module in model.named_modules():
        batch = isinstance(module, _BatchNorm)
        if batch or (isinstance(module, _NormBase) and module.track_running_stats):
            kind = type(module).__name__
            raise OptionError(f"{name}: {kind} keeps statistics of the batch; swap it first")
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    written = Effects(capture(model)).written_tensors
    if name := next((name for name in written if name in buffers), ""):
        raise OptionError(f"{name}: the forward writes this buffer, which all samples share")
