"""relu(x) = max(x, 0) becomes silu(x) = x * sigmoid(x): close to it, smooth."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from rewrite import Captured, Change, Contract, Pass, Site, Skip
from rewrite.graph import Editable
from rewrite.graph.operators import activation_of


@dataclass(frozen=True)
class ReluToSilu(Pass):
    """Replace ReLU modules by SiLU."""

    name: ClassVar[str] = "relu-to-silu"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    inplace: bool = field(default=False, metadata={"help": "overwrite the input"})

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield each ReLU module once; functional ones are declined."""
        met: set[str] = set()
        for node in captured.nodes():
            activation = activation_of(captured, node)
            if activation is None or activation.name != "relu" or activation.target in met:
                continue
            met.add(activation.target)
            if activation.module is None:
                yield Skip(activation.target, "relu", "is a line of code, not a module")
            else:
                yield Site(activation.target, "ReLU", node)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Replace one module."""
        captured.editor.replace(site.target, nn.SiLU(inplace=self.inplace))
        return Change(site.target, site.before, "SiLU")
