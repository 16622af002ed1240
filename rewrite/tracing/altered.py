"""Detect forwards that alter the model's modules: set their attributes, swap or reorder them.

    self.bn.eps = 1e-3                         the layer computes another map from here on
    self.a, self.b = self.b, self.a            the next call runs the other module
    self.norms.append(self.norms.pop(0))       likewise

Code may spell this in any way and call any helper, so it is detected by its effect: by comparing
the traced stand-in of the model before and after. Lines that the trace did not run are analyzed
from their source instead (`rewrite.graph.model_code`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rewrite.runtime.tree import Tree
from rewrite.tracing.tracer import is_leaf

UNUSED_IN_EVAL = frozenset({"momentum", "num_batches_tracked"})
"""Attributes of a layer that say nothing of what it computes in eval mode."""


class Layers:
    """The attributes of all layers of a stand-in, noted before anything is traced."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._layers = {m: dict(vars(m)) for _, m in tree.modules() if not m._modules}

    def altered(self, moved: set[nn.Module]) -> dict[str, str]:
        """Return the modules that a forward altered, by name, each with the reason.

        Args:
            moved: modules that a forward assigned to another place.
        """
        found: dict[str, str] = {}
        for module, held in self._layers.items():
            if (attr := _assigned(module, held)) is not None and is_leaf(module):
                found[self._tree.name(module)] = f"a forward assigns its {attr}"
        for name in self._below(moved):
            found.setdefault(name, "a forward puts it elsewhere")
        return found

    def _below(self, moved: set[nn.Module]) -> Iterator[str]:
        for module in moved:
            if module in self._tree:
                yield from (self._tree.name(m) for m in module.modules() if m in self._tree)


def _assigned(module: nn.Module, held: dict[str, Any]) -> str | None:
    """Return the first attribute of a layer that has another value than was noted, if any."""
    now = vars(module)
    if list(now) == list(held) and all(map(operator.is_, now.values(), held.values())):
        return None  # as with most layers
    for attr, value in held.items():
        same = now.get(attr) is value or isinstance(value, Tensor | dict)
        if not same and attr not in UNUSED_IN_EVAL:
            return attr
    return None
