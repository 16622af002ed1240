"""The path norms of a model and its parts, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from rewrite.rescaling.path_norm import RegionNorm, path_norms_by_region
from rewrite.text.tables import Rows

if TYPE_CHECKING:
    from rich.console import RenderableType


ORDERS = (1.0, 2.0, math.inf)


@dataclass(frozen=True)
class PathNormReport:
    """The path norms of a model, or else of its largest parts that have path norms."""

    rows: tuple[RegionNorm, ...]

    def to_json(self) -> str:
        """Return everything as JSON text; infinity is the key "inf"."""
        rows = [
            {
                "module": row.name,
                "path_norm": {f"{p:g}": value for p, value in row.norms.items()},
                "reason": row.reason,
            }
            for row in self.rows
        ]
        return json.dumps({"path_norms": rows}, indent=2) + "\n"

    def tables(self, *, verbose: bool = False) -> Iterator[RenderableType]:
        """Yield what to print, as rich renderables."""
        heads = ("module", "L1", "L2", "largest path", "why none")
        rows = []
        for row in self.rows:
            cells = [f"{row.norms[p]:.6g}" if row.norms else "" for p in ORDERS]
            rows.append((row.name or "(the model)", *cells, row.reason))
        yield Rows(heads, rows, "Path norms", prose=True)


def path_norm_report(model: nn.Module, example_inputs: Any = None) -> PathNormReport:
    """Return the L1, L2 and largest-path norms of `model`, or of its parts.

    Raises:
        OptionError: no input is known.
    """
    return PathNormReport(tuple(path_norms_by_region(model, ORDERS, example_inputs)))
