"""The normalization in front of a model, (x - mean) / std, folded into its first layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite.affine.algebra import Affine
from rewrite.errors import OptionError
from rewrite.fold.candidates import Source
from rewrite.fold.folder import Fold, Folder
from rewrite.outcomes import Declined


class InputNorm(nn.Module):
    """Preprocessing: y = (x - mean) / std per channel (axis 1) of the first input."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, in its own dtype."""
        shape = (1, -1, *(1,) * (input.dim() - 2))
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return ((input - mean.view(shape)) / std.view(shape)).to(input.dtype)


def parse_input_norm(text: str) -> tuple[Tensor, Tensor]:
    """Return mean and std of "0.485,0.456,0.406/0.229,0.224,0.225".

    Raises:
        OptionError: the text is not two lists of numbers of one length, or a std is not positive.
    """
    try:
        mean, std = (
            torch.tensor([float(number) for number in part.split(",")], dtype=torch.float64)
            for part in text.split("/")
        )
    except ValueError:
        raise OptionError(
            f"fold: input_norm is {text!r}; pass mean/std, as 0.5,0.5/0.2,0.2"
        ) from None
    if len(mean) != len(std) or not bool((std > 0).all()):
        raise OptionError(
            f"fold: input_norm has {len(mean)} means and {len(std)} stds; pass as many of both, "
            "every std above zero"
        )
    return mean, std


def fold_input(folder: Folder, mean: Tensor, std: Tensor) -> Fold | Declined:
    """Fold (x - mean) / std of the model's first input into what reads it."""
    region = folder.captured.regions[0] if folder.captured.regions else None
    inputs = [] if region is None else [n for n in region.graph.nodes if n.op == "placeholder"]
    if region is None or region.name or not inputs:
        return Declined("the forward of the model cannot be traced")
    axis = folder.planner.channel_axis_of_input(inputs[0])
    if axis is None:
        return Declined("the number of axes of the input is unknown (pass example_inputs)")
    source = Source("input", "input", "(x - mean) / std", (inputs[0],), (inputs[0],), axis, None)
    return folder.fold_at(source, Affine(1 / std, -mean / std))
