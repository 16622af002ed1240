"""The result of comparing two models, and its report."""

from __future__ import annotations

import enum
import html
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewrite.outcomes import Contract

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from rewrite.equivalence.divergence import Divergence
    from rewrite.equivalence.record import Record


JUDGED = (Contract.EXACT, Contract.EXACT_IN_EVAL)
"""The contracts that promise equality."""


class Level(enum.StrEnum):
    """How many inputs a verification tries: the given ones, or variations of them as well."""

    QUICK = "quick"
    """The given input alone: what `convert` affords on every run."""
    THOROUGH = "thorough"
    """Inputs that find errors beside it: values, batch sizes, spatial sizes; gradients if exact."""


@dataclass(frozen=True)
class Case:
    """One input: its name, the distance of both models' outputs, or why it was left out."""

    name: str
    inputs: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    skipped: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Verification:
    """The result of comparing two models; true if the contract holds.

    Attributes:
        contract: the contract that was checked.
        level: how many inputs were tried.
        max_abs: the largest absolute difference over all cases (float64 for exact contracts).
        max_rel: likewise relative to the output's largest magnitude.
        agreement: fraction of equal top-1 classes, None where outputs have no classes.
        predictions: the number of top-1 classes compared: one per sample, or per pixel of a
            segmentation.
        cosine: cosine similarity of the outputs.
        drift: the largest difference in the models' own dtype.
        rounding: the part of `max_rel` that rounding of stored parameters explains, None where
            they are stored in float64.
        noise: the original's own distance to its float64 self, on the same input.
        cases: every input that was tried.
        reasons: why the contract does not hold; empty if it does.
        divergence: the first call at which the models diverge, if they do.
        seconds: wall-clock time.
        runs: the records of both models in float64 on one input that was compared value by value:
            the first on which they diverge, else the first; None where none was.
    """

    contract: Contract
    level: Level
    max_abs: float = 0.0
    max_rel: float = 0.0
    agreement: float | None = None
    cosine: float | None = None
    drift: float | None = None
    noise: float | None = None
    rounding: float | None = None
    cases: tuple[Case, ...] = ()
    reasons: tuple[str, ...] = ()
    divergence: Divergence | None = None
    seconds: float = field(default=0.0, compare=False)
    runs: tuple[Record, Record] | None = field(default=None, compare=False, repr=False)
    predictions: int = 0

    @property
    def ok(self) -> bool:
        """Whether the contract holds."""
        return not self.reasons

    def __bool__(self) -> bool:
        return self.ok

    def _repr_html_(self) -> str:
        """Return the report as HTML for a notebook, with the terminal's text."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __repr__(self) -> str:
        return f"<Verification: {str(self).splitlines()[0]}>"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON's own types."""
        return {
            "ok": self.ok,
            "contract": str(self.contract),
            "level": str(self.level),
            "max_abs": _finite(self.max_abs),
            "max_rel": _finite(self.max_rel),
            "agreement": self.agreement,
            "predictions": self.predictions,
            "cosine": self.cosine,
            "drift": self.drift,
            "noise": self.noise,
            "rounding": self.rounding,
            "cases": [
                {**vars(case), "max_abs": _finite(case.max_abs), "max_rel": _finite(case.max_rel)}
                for case in self.cases
            ],
            "reasons": list(self.reasons),
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
        }

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        ran = sum(not case.skipped for case in self.cases)
        verdict = "holds" if self.ok else "does not hold"
        lines = [
            f"{self.contract} {verdict}: {ran} input{'' if ran == 1 else 's'}, {self.distance()}"
        ]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  left out: {c.name}: {c.skipped}" for c in self.cases if c.skipped]
        if self.divergence is not None:
            lines.append(str(self.divergence))
        return "\n".join(lines)

    def tables(self, *, verbose: bool = False) -> Iterator[Table | Text | str]:
        """Yield the report as rich renderables."""
        from rich.table import Table
        from rich.text import Text

        verdict = "holds" if self.ok else "does not hold"
        yield Text(f"{self.contract} {verdict}: {self.distance()}", "bold")
        table = Table("", "input", "shapes", "error", box=None, pad_edge=False)
        for case in self.cases:
            mark = Text() if case.skipped else Text("ok", "green")
            if case.failed:
                mark = Text("FAIL", "bold red")
            error = f"left out: {case.skipped}" if case.skipped else f"{case.max_rel:.1e}"
            table.add_row(mark, *map(Text, (case.name, case.inputs, error)))
        yield table
        yield from map(Text, self.reasons)
        if self.divergence is not None:
            yield Text(str(self.divergence))

    def distance(self) -> str:
        """Return the distances in words: "2.1e-06, 0.8 x the noise of the original"."""
        parts = []
        if self.contract in JUDGED:
            parts.append(f"float64 error {self.max_rel:.1e}")
            if self.rounding and self.max_rel:
                parts.append(f"{self.max_rel / self.rounding:.1f} x the rounding of the parameters")
        if self.drift is not None and self.noise is not None and self.contract in JUDGED:
            ratio = self.drift / self.noise if self.noise else math.inf if self.drift else 0.0
            parts.append(f"drift {self.drift:.1e} ({ratio:.1f} x the noise of the original)")
        if self.agreement is not None:
            parts.append(same_top1(self.agreement, self.predictions))
        if self.cosine is not None and self.contract not in JUDGED:
            parts.append(f"cosine {self.cosine:.4f}")
        return ", ".join(parts)


def same_top1(share: float, predictions: int) -> str:
    """Return an agreement in words: the fraction of equal top-1 classes, and of how many."""
    agreed = round(share * predictions)
    rate = f" ({share:.1%})" if agreed < predictions else ""
    return f"same top-1 as the original: {agreed:,} of {predictions:,}{rate}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
