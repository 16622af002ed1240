"""A pass of your own: HardSwish to SiLU, in every spelling, held to its contract."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import rewrite
from rewrite import Captured, Change, Contract, Pass, Site, Skip
from rewrite.graph import Editable, activation_of


@dataclass(frozen=True)
class HardswishToSilu(Pass):
    """Replace Hardswish modules by SiLU.

    1. Every `nn.Hardswish` is replaced, once, whatever calls it.
    2. Declined: a line of code that applies hardswish, since there is no module to replace; a
       module with hooks, which would be lost.
    """

    name: ClassVar[str] = "hardswish-to-silu"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every hardswish in the order of the data."""
        for node in captured.nodes():
            activation = activation_of(captured, node)
            if activation is None or activation.name != "hardswish":
                continue
            if activation.module is None:
                yield Skip(activation.target, "hardswish", "is a line of code, not a module")
            elif reasons := captured.hooks(activation.module):
                yield Skip(activation.target, "Hardswish", f"{reasons[0]}; remove it first")
            elif node is captured.call_sites(node)[0]:
                yield Site(activation.target, "Hardswish", node)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one module."""
        captured.editor.replace(site.target, nn.SiLU())
        return Change(site.target, site.before, "SiLU")


class Network(nn.Module):
    """One activation that is a module, and one that is a line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply both."""
        return nn.functional.hardswish(self.body(x))


if __name__ == "__main__":  # not where the pass is imported
    torch.manual_seed(0)
    result = rewrite.convert(
        Network().eval(), [HardswishToSilu()], example_inputs=(torch.randn(4, 8),)
    )
    print(result.report)
    assert [change.target for change in result.report.changes] == ["body.1"]
    assert [skip.reason for skip in result.report.skips] == ["is a line of code, not a module"]
    assert isinstance(result.model.body[1], nn.SiLU)
