"""A model as one layer, for libraries that compute the gradient of each sample layer by layer.

    g_n = ∂/∂θ ⟨f(x_n; θ), ∂L/∂f(x)_n⟩        for sample n, by one `vmap` over the samples

Such a library (Opacus) has a rule for each kind of layer, reads the batch off the first axis of
that layer's input, and refuses a layer with buffers. Relative position tables (bare parameters,
with index buffers beside them) and attention over windows or heads (the first axis holds several
rows a sample) do not fit. As one layer, the model has its samples on the first axis whatever its
inside does with them, and the rule for a layer that the library does not know is the line above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from rewrite.errors import OptionError
from rewrite.graph.capture import capture
from rewrite.graph.effects import Effects


class AsOneLayer(nn.Module):
    """A model whose parameters are all its own, and that shows no modules or buffers below it.

        private, optimizer, loader = PrivacyEngine().make_private(module=AsOneLayer(model), …)

    The parameters are those of the model, not copies: what is trained is the model. Its forward
    runs twice a step. Modes "hooks" and "functorch" of Opacus take it.

    Args:
        model: from one tensor, samples along axis 0, to one tensor. No layer of it may look at
            other samples or write a buffer; random numbers in its forward are refused by `vmap`.

    Raises:
        OptionError: a norm uses statistics of the batch, or the forward writes a buffer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _check_samples_stay_apart(model)
        # In a list, or it would be a child, with all that it holds.
        self._held = [model]
        self._names = {name.replace(".", "/"): name for name, _ in model.named_parameters()}
        for key, name in self._names.items():
            self.register_parameter(key, model.get_parameter(name))
        self.train(model.training)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._held[0]

    def forward(self, samples: Tensor) -> Tensor:
        """Return what the model returns for samples (N, *).

        Raises:
            OptionError: that is not one tensor: the gradient through the others would be lost.
        """
        given: dict[str, Tensor] = {name: getattr(self, key) for key, name in self._names.items()}
        output = functional_call(self.model, given, (samples,))
        if not isinstance(output, Tensor):
            raise OptionError(
                f"the model returns a {type(output).__name__}; wrap it to return one tensor"
            )
        return output

    def train(self, mode: bool = True) -> Self:
        """Set the mode, also that of the model."""
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers of the model with the parameters; meta tensors have no values to use."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                moved: Any = None if buffer is None else fn(buffer)
                if moved is not None and not moved.is_meta:
                    module._buffers[key] = moved
        return self


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
