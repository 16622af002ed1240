"""What a conversion did, typed: as an object, as JSON, as a table."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rewrite.outcomes import Change, Contract, Skip
from rewrite.text.alike import group_alike

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from rewrite.equivalence.side_by_side import SideBySide
    from rewrite.equivalence.verification import Verification
    from rewrite.onnx.report import OnnxVerification


def violation(name: str) -> str:
    """Say of a tensor that it changed although no change names its module."""
    return f"{name} changed although no rewritten site names it"


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

    @property
    def violated(self) -> tuple[str, ...]:
        """The violations in words."""
        return tuple(map(violation, self.violations))


@dataclass(frozen=True)
class Report:
    """Everything that a conversion did.

    Attributes:
        passes: one report a pass, in order.
        notes: what the user should know beside it (no input to verify with, and the like).
        verification: the whole conversion against the original; None if it could not be measured.
        exported: the ONNX file that was made of the result against it; None if none was made.
    """

    passes: tuple[PassReport, ...]
    notes: tuple[str, ...] = ()
    verification: Verification | None = None
    exported: OnnxVerification | None = None

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
        """Whether every contract held, and what was exported agrees, as far as it was checked."""
        whole = (self.verification, self.exported)
        return all(item.ok for item in self.passes) and all(v is None or v.ok for v in whole)

    @property
    def failure(self) -> str:
        """The first broken contract in one line: the pass, and what is wrong; "" if all hold."""
        for part in self.passes:
            if part.violations:
                return f"{part.spec}: {part.violated[0]}"
            if part.verification is not None and not part.verification.ok:
                return f"{part.spec} is not {part.contract}: {part.verification.reasons[0]}"
        if self.verification is not None and not self.verification.ok:
            return f"all passes together: {self.verification.reasons[0]}"
        if self.exported is not None and not self.exported.ok:
            return f"{self.exported.path} does not agree with the model: {self.exported.reasons[0]}"
        return ""

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists."""
        exported = {} if self.exported is None else {"exported": self.exported.to_dict()}
        return {
            "ok": self.ok,
            "passes": [
                {
                    "pass": item.spec,
                    "contract": item.contract,
                    "ok": item.ok,
                    "changes": [asdict(change) for change in item.changes],
                    "skips": [asdict(skip) for skip in item.skips],
                    "violations": list(item.violations),
                    "verification": _as_dict(item.verification),
                }
                for item in self.passes
            ],
            "verification": _as_dict(self.verification),
            "notes": list(self.notes),
            **exported,
        }

    def tables(self, *, verbose: bool = False) -> Iterator[RenderableType]:
        """Yield what a terminal shows: what was left alone first, the verdict last.

        Rows that are alike but for their numbers are one, unless `verbose`.
        """
        from rich.text import Text

        for part in self.passes:
            yield Text(f"{part.spec} ({part.contract})", style="bold")
            skips = [(s.target or "(root)", s.before, s.reason) for s in part.skips]
            for name, before, reason, count in _rows(skips, verbose):
                yield _entry(name, f"{before}, left alone: {reason}", count, "yellow")
            changes = [(c.target or "(root)", c.before, c.after, c.note) for c in part.changes]
            for name, before, after, note, count in _rows(changes, verbose):
                yield _entry(name, f"{before} → {after}{f' ({note})' if note else ''}", count)
            for said in part.violated:
                yield Text(said, style="red")
            yield Text(f"{len(part.changes)} rewritten, {len(part.skips)} left alone")
        for note, count in _rows([(note,) for note in self.notes], verbose):
            yield Text(f"note: {note}{f'  {count} alike' if count > 1 else ''}")
        if self.verification is not None:
            yield Text(str(self.verification))
        if self.exported is not None:
            yield from self.exported.tables(verbose=verbose)

    def to_html(
        self,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        example_inputs: Any = None,
        provenance: Mapping[str, str] | None = None,
    ) -> str:
        """Return the report as one HTML page that opens offline.

        With both models the page shows them module by module, each with its error on what they were
        verified on; where no value on the way was compared they are run on the input.

        Args:
            before: the original.
            after: the rewritten model.
            example_inputs: a tensor, a tuple of positional inputs or a dict of keywords.
            provenance: what the page says of where it comes from; by default the versions.
        """
        from rewrite.html.pages import conversion_page
        from rewrite.provenance import provenance as reproduced

        modules = None
        if before is not None and after is not None:
            modules = self._modules(before, after, example_inputs)
        known = reproduced() if provenance is None else provenance
        title = "conversion" if before is None else f"conversion of {type(before).__name__}"
        return conversion_page(self, modules, known, title).render()

    def _modules(self, before: nn.Module, after: nn.Module, example_inputs: Any) -> SideBySide:
        from rewrite.equivalence.side_by_side import of_runs, side_by_side
        from rewrite.runtime.inputs import Inputs

        if self.verification is not None and self.verification.runs is not None:
            return of_runs(before, after, self.verification.runs)
        inputs = None if example_inputs is None else Inputs.of(example_inputs)
        return side_by_side(before, after, inputs)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the terminal's text."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __repr__(self) -> str:
        passes = ", ".join(part.spec for part in self.passes)
        verdict = "ok" if self.ok else "broken"
        return (
            f"<Report of {passes}: {len(self.changes)} rewritten, {len(self.skips)} left alone, "
            f"{verdict}>"
        )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, highlight=False)
        with console.capture() as printed:
            for shown in self.tables():
                console.print(shown)
        return printed.get()


_LOW = 0.95
"""Below which a swap that keeps a model approximately has lost enough to say what helps."""


def advice(
    verification: Verification | None, notes: Sequence[str], *, of_users: bool, fits: bool
) -> tuple[str, ...]:
    """Return what to do about a low agreement, in a sentence, or nothing.

    Args:
        verification: of a whole conversion.
        notes: what is said already; a pass that measured on held-out data knows better.
        of_users: whether it ran on inputs of the user, and not on made-up ones.
        fits: whether a pass of it can fit to data.
    """
    if verification is None or verification.contract is not Contract.APPROXIMATE:
        return ()
    if any("held-out" in note for note in notes):
        return ()
    share = verification.agreement
    if share is None:
        share = verification.cosine
    if share is None or share >= _LOW:
        return ()
    if not of_users:
        return (
            "agreement is low on a random input, where it says little: measure on your own data "
            "(--input FILE, --calibration DATA)",
        )
    fit = "--keep function --calibration DATA fits to unlabelled data, " if fits else ""
    return (f"agreement is low: {fit}`rewrite recover` trains on {'it' if fits else 'your data'}",)


def _rows(rows: Sequence[tuple[str, ...]], verbose: bool) -> Iterator[tuple[Any, ...]]:
    """Yield each row with the number of rows that it stands for."""
    if verbose:
        yield from ((*row, 1) for row in rows)
    else:
        yield from ((*merged.texts, merged.count) for merged in group_alike(rows))


def _entry(name: str, text: str, count: int, style: str = "") -> RenderableType:
    """Return a row: the name on a line of its own, unbroken, and what there is to say below it."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    alike = f"  {count} alike" if count > 1 else ""
    return Group(
        Padding(Text(f"{name}{alike}", style), (0, 0, 0, 2), expand=False),
        Padding(Text(text, style), (0, 0, 0, 6), expand=False),
    )


def _as_dict(verification: Verification | None) -> dict[str, Any] | None:
    return None if verification is None else json.loads(verification.to_json())
