"""The page of a conversion, of a verification, and of two models beside each other."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rewrite.equivalence.side_by_side import ROUNDING
from rewrite.equivalence.verification import JUDGED
from rewrite.html.page import Number, Page
from rewrite.outcomes import Contract
from rewrite.provenance import shown_path
from rewrite.text.alike import group_alike

if TYPE_CHECKING:
    from rewrite.equivalence.side_by_side import SideBySide
    from rewrite.equivalence.verification import Verification
    from rewrite.onnx.report import OnnxVerification
    from rewrite.report import Report


def conversion_page(
    report: Report,
    modules: SideBySide | None = None,
    provenance: Mapping[str, str] | None = None,
    title: str = "conversion",
) -> Page:
    """Return the page of a conversion, with both models where their modules are given."""
    checks = [item.verification for item in report.passes if item.verification is not None]
    check = report.verification or (checks[-1] if checks else None)
    changes, skips = len(report.changes), len(report.skips)
    exported = report.exported
    ok, verdict, measured = _verdict(report, check)
    numbers = [
        Number(str(changes), "rewritten"),
        Number(str(skips), "left alone, each with its reason" if skips else "left alone"),
        *_sizes(modules),
        *_took(sum(item.seconds for item in report.passes), "to rewrite"),
        *([] if check is None else _took(check.seconds, "to verify")),
    ]
    return Page(
        title=f"{title}: {', '.join(item.spec for item in report.passes)}",
        verdict=verdict,
        ok=ok,
        measured=measured,
        numbers=numbers,
        reasons=[
            *(said for item in report.passes for said in item.violated),
            *(() if check is None else check.reasons),
            *(() if exported is None else exported.reasons),
        ],
        divergence=(None if check is None else check.divergence)
        or (None if exported is None else exported.divergence),
        changes=[(item.spec, change) for item in report.passes for change in item.changes],
        skips=[(item.spec, skip) for item in report.passes for skip in item.skips],
        cases=() if check is None else check.cases,
        notes=[*_alike(report.notes), *_checks(exported)],
        modules=modules,
        wrong=_wrong(check),
        provenance=provenance or {},
    )


def _verdict(report: Report, check: Verification | None) -> tuple[bool | None, str, str]:
    """Return whether a conversion is right (None: not known), why, and the measured distance."""
    exported, sites = report.exported, _count(len(report.changes), "site")
    if exported is not None and not exported.ok:
        said = f"{shown_path(exported.path)} does not agree with the rewritten model"
        return report.ok, f"{said}: {exported.reasons[0]}.", ""
    if not report.ok:
        measured = "" if check is None else f"{check.distance()}."
        return False, f"The result breaks its contract: {report.failure}.", measured
    if not report.changes:
        return None, "Nothing was rewritten.", ""
    if check is None:
        return None, f"{sites} rewritten; nothing was run, so nothing is verified.", ""
    return True, f"{sites} rewritten; {check.contract} holds: {check.distance()}.", ""


def verification_page(
    found: Verification,
    modules: SideBySide | None = None,
    provenance: Mapping[str, str] | None = None,
    title: str = "verification",
) -> Page:
    """Return the page of a verification of two models."""
    ran = _count(sum(not case.skipped for case in found.cases), "input")
    measured = f"{found.distance()}."
    if found.ok:
        verdict, measured = f"{found.contract} holds on {ran}: {measured}", ""
    else:
        verdict, measured = (
            f"{found.contract} does not hold: {found.reasons[0]}.",
            f"{ran}: {measured}",
        )
    return Page(
        title=title,
        verdict=verdict,
        ok=found.ok,
        measured=measured,
        numbers=[*_sizes(modules), *_took(found.seconds, "to verify")],
        reasons=found.reasons,
        divergence=found.divergence,
        cases=found.cases,
        modules=modules,
        wrong=_wrong(found),
        provenance=provenance or {},
    )


def comparison_page(
    modules: SideBySide,
    provenance: Mapping[str, str] | None = None,
    names: tuple[str, str] = ("A", "B"),
) -> Page:
    """Return the page of two models beside each other; nothing is judged."""
    return Page(
        title=f"comparison of {names[0]} and {names[1]}",
        verdict=f"{modules.summary()}.",
        ok=None,
        numbers=_sizes(modules),
        modules=modules,
        names=names,
        wrong=ROUNDING,
        provenance=provenance or {},
    )


def onnx_page(found: OnnxVerification, provenance: Mapping[str, str] | None = None) -> Page:
    """Return the page of a verification of an ONNX graph."""
    nodes, path = sum(found.operator_counts.values()), shown_path(found.path)
    wrong = [check for check in found.checks if not check.ok]
    verdict = (
        f"{path}: {len(wrong)} of {_count(len(found.checks), 'check')} failed: {found.reasons[0]}."
        if wrong
        else f"{path}: verified, {_count(len(found.checks), 'check')}."
    )
    most = sorted(found.operator_counts.items(), key=lambda item: -item[1])[:5]
    return Page(
        title=f"verification of {path}",
        verdict=verdict,
        ok=found.ok if found.checks else None,
        numbers=[
            Number(str(nodes), "nodes"),
            *(Number(str(count), kind) for kind, count in most),
            *_took(found.seconds, "to verify"),
        ],
        reasons=found.reasons,
        divergence=found.divergence,
        notes=_checks(found),
        provenance=provenance or {},
    )


def _alike(notes: Sequence[str]) -> list[str]:
    """Return the notes, those that differ in numbers only as one."""
    merged = group_alike([(note,) for note in notes])
    return [
        f"{each.texts[0]} ({each.count} alike)" if each.count > 1 else each.texts[0]
        for each in merged
    ]


def _took(seconds: float, what: str) -> list[Number]:
    """Return how long something took; nothing where the same bytes are wanted of each run.

    `SOURCE_DATE_EPOCH` says so: https://reproducible-builds.org/specs/source-date-epoch/
    """
    if "SOURCE_DATE_EPOCH" in os.environ:
        return []
    return [Number(f"{seconds:.1f} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms", what)]


def _checks(found: OnnxVerification | None) -> list[str]:
    """Return what holds of a graph, and what else there is to say of it."""
    if found is None:
        return []
    held = (f"{check.name}: {check.found}" for check in found.checks if check.ok)
    return [*held, *found.notes]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sizes(modules: SideBySide | None) -> list[Number]:
    if modules is None:
        return []
    before, after = modules.parameters
    calls = [
        sum(sum(row.calls.values()) for row in rows) for rows in (modules.before, modules.after)
    ]
    found = [Number(f"{before:,} → {after:,}", "parameters")]
    return found + (
        [Number(f"{calls[0]:,} → {calls[1]:,}", "operator calls")] if any(calls) else []
    )


def _wrong(check: Verification | None) -> float:
    """Return from which relative error on a value is off; infinite where equality is no promise."""
    if check is None or Contract(check.contract) not in JUDGED:
        return math.inf
    return max(ROUNDING, 8 * (check.rounding or 0.0))
