"""What has to be remembered of a model that is rewritten in place: its answers, its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from rewrite.runtime.inputs import Inputs


def take_snapshot(model: nn.Module, inputs: Inputs | None, seed: int) -> Snapshot:
    """Return what has to be remembered of a model that is rewritten in place."""
    tensors = _tensor_identities(model)
    if inputs is None:
        return Snapshot(None, tensors)
    from rewrite.equivalence.equality import run_original
    from rewrite.runtime.modes import evaluating

    with evaluating(model):
        return Snapshot(run_original(model, "given", inputs, seed), tensors)


class Snapshot(nn.Module):
    """What is remembered of a consumed model: what it answered, and which tensors it held."""

    def __init__(self, outputs: Any, tensors: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.outputs = outputs
        self.tensors = tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        """Return itself: nothing changes what is remembered."""
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Return what the model answered."""
        return self.outputs

    def violations(self, after: nn.Module, touched: set[str]) -> tuple[str, ...]:
        """Return the tensors outside of `touched` that are not the very ones from before."""
        now = _tensor_identities(after)
        return tuple(
            name
            for name, identity in self.tensors.items()
            if now.get(name) != identity
            and not any(name == part or name.startswith(f"{part}.") for part in touched)
        )


def _tensor_identities(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return which object each tensor is, and how often it has been written."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: (id(tensor), tensor._version) for name, tensor in tensors}
