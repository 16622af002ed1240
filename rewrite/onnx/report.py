"""The result of verifying an ONNX graph, and its report."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from rewrite.equivalence.divergence import Divergence


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, what was found, and whether that is as it should be."""

    name: str
    found: str
    ok: bool = True


@dataclass(frozen=True)
class OnnxVerification:
    """What a verification of an ONNX graph found; true when nothing is wrong with it.

    Attributes:
        path: the file.
        checks: everything that was looked at.
        operator_counts: how often each operator occurs.
        opset: the version of the standard operators.
        max_abs: the largest distance to the reference's exact (float64) output, None without one.
        max_rel: likewise, relative to the output's largest magnitude.
        noise: the reference's own distance to it: the scale of `max_rel`.
        agreement: share of equal top-1 classes.
        cosine: cosine similarity of the outputs.
        divergence: the first node that parts from the reference.
        notes: what an export did beside exporting, and what a verification saw and did not judge.
        seconds: how long the verification took.
    """

    path: str
    checks: tuple[Check, ...]
    operator_counts: Mapping[str, int] = field(default_factory=dict)
    opset: int = 0
    max_abs: float | None = None
    max_rel: float | None = None
    noise: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        """Whether every check came out as it should; `verdict` says whether there was any."""
        return all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """In a word: verified, wrong, or not verified where nothing was looked at."""
        if not self.checks:
            return "not verified"
        return "verified" if self.ok else "wrong"

    def __bool__(self) -> bool:
        return self.ok

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is wrong, in one line each."""
        return tuple(f"{check.name}: {check.found}" for check in self.checks if not check.ok)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON's own types."""
        left_out = ("divergence", "seconds")
        values = {key: value for key, value in vars(self).items() if key not in left_out}
        for key in ("max_abs", "max_rel", "noise"):
            value = values[key]
            values[key] = value if value is not None and math.isfinite(value) else None
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            **values,
            "checks": [asdict(check) for check in self.checks],
            "operator_counts": dict(self.operator_counts),
            "notes": list(self.notes),
            "reasons": list(self.reasons),
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
        }

    @property
    def census(self) -> Mapping[str, int]:
        """Deprecated name of `operator_counts`."""
        warnings.warn("census is now operator_counts", DeprecationWarning, stacklevel=2)
        return self.operator_counts

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.verdict}"]
        lines += [f"  {'ok  ' if c.ok else 'FAIL'} {c.name}: {c.found}" for c in self.checks]
        lines += [f"  note: {note}" for note in self.notes]
        if self.divergence is not None:
            lines.append(str(self.divergence))
        return "\n".join(lines)

    def tables(self, *, verbose: bool = False) -> Iterator[Table | Text | str]:
        """Yield what a terminal shows."""
        from rich.table import Table
        from rich.text import Text

        yield Text(f"{self.path}: {self.verdict}", "bold")
        table = Table("", "check", "found", box=None, pad_edge=False)
        for check in self.checks:
            mark = Text("ok", "green") if check.ok else Text("FAIL", "bold red")
            table.add_row(mark, Text(check.name), Text(check.found))
        if self.checks:
            yield table
        yield from (Text(f"note: {note}") for note in self.notes)
        if self.divergence is not None:
            yield Text(str(self.divergence))
