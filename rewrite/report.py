"""What a conversion did, typed: as an object, as JSON, as a table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rewrite.outcomes import Change, Skip

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from rewrite.equivalence.verification import Verification


@dataclass(frozen=True)
class PassReport:
    """One pass: its text form, its contract, what it did, and how the result was verified.

    `violations` are tensors that differ although no change names their module: a broken pass.
    `verification` is None where it was not asked for or no input was known.
    """

    spec: str
    contract: str
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    seconds: float
    violations: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def ok(self) -> bool:
        """Whether the contract held, as far as it was checked."""
        return not self.violations and (self.verification is None or self.verification.ok)


@dataclass(frozen=True)
class Report:
    """Everything that a conversion did.

    Attributes:
        passes: one report a pass, in order.
        notes: what the user should know beside it (no input to verify with, and the like).
        verification: the whole conversion against the original; None if it could not be measured.
    """

    passes: tuple[PassReport, ...]
    notes: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every change of every pass."""
        return tuple(change for item in self.passes for change in item.changes)

    @property
    def skips(self) -> tuple[Skip, ...]:
        """Every declined candidate of every pass."""
        return tuple(skip for item in self.passes for skip in item.skips)

    @property
    def ok(self) -> bool:
        """Whether every contract held, as far as it was checked."""
        return all(item.ok for item in self.passes) and (
            self.verification is None or self.verification.ok
        )

    @property
    def failure(self) -> str:
        """The first broken contract in one line: the pass, and what is wrong; "" if all hold."""
        for part in self.passes:
            if part.violations:
                return (
                    f"{part.spec}: {part.violations[0]} changed although no rewritten site names it"
                )
            if part.verification is not None and not part.verification.ok:
                return f"{part.spec} is not {part.contract}: {part.verification.reasons[0]}"
        if self.verification is not None and not self.verification.ok:
            return f"all passes together: {self.verification.reasons[0]}"
        return ""

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists."""
        return {
            "ok": self.ok,
            "passes": [
                {
                    "pass": item.spec,
                    "contract": item.contract,
                    "ok": item.ok,
                    "seconds": round(item.seconds, 4),
                    "changes": [asdict(change) for change in item.changes],
                    "skips": [asdict(skip) for skip in item.skips],
                    "violations": list(item.violations),
                    "verification": _as_dict(item.verification),
                }
                for item in self.passes
            ],
            "verification": _as_dict(self.verification),
            "notes": list(self.notes),
        }

    def tables(self) -> Iterator[RenderableType]:
        """Yield one rich table a pass, and the agreement."""
        from rich.table import Table
        from rich.text import Text

        for item in self.passes:
            yield Text(f"{item.spec} ({item.contract})", style="bold")
            table = Table(box=None, pad_edge=False)
            for column in ("module", "was", "is", "note"):
                table.add_column(column, overflow="fold")
            for change in item.changes:
                table.add_row(*map(Text, (change.target, change.before, change.after, change.note)))
            for skip in item.skips:
                table.add_row(
                    *map(Text, (skip.target, skip.before, "left alone", skip.reason)),
                    style="yellow",
                )
            if item.changes or item.skips:
                yield table
            yield Text(f"{len(item.changes)} rewritten, {len(item.skips)} left alone")
            for name in item.violations:
                yield Text(f"{name} changed although no rewritten site names it", style="red")
        for note in self.notes:
            yield Text(f"note: {note}")
        if self.verification is not None:
            yield Text(str(self.verification))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        return _printed(console, self)


def _printed(console: Console, report: Report) -> str:
    with console.capture() as printed:
        for item in report.tables():
            console.print(item)
    return printed.get()


def _as_dict(verification: Verification | None) -> dict[str, Any] | None:
    return None if verification is None else json.loads(verification.to_json())
