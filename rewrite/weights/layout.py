"""How a weight is laid out: which axis counts outputs, which inputs, how groups divide them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How the outputs, inputs and groups of a linear map are stored.

    `inputs_first`: axis 0 holds the inputs (transposed convolutions), not the outputs.
    """

    inputs_first: bool = False
    groups: int = 1

    def units(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` as (groups, outputs, inputs, *kernel), a view where storage allows."""
        kernel = weight.shape[2:]
        first = weight.shape[0] // self.groups
        grouped = weight.reshape(self.groups, first, weight.shape[1], *kernel)
        return grouped.transpose(1, 2) if self.inputs_first else grouped

    def weight(self, units: torch.Tensor) -> torch.Tensor:
        """Return the weight whose `units` these are."""
        grouped = units.transpose(1, 2) if self.inputs_first else units
        return grouped.reshape(grouped.shape[0] * grouped.shape[1], *grouped.shape[2:])
