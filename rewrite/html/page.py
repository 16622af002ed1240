"""One page from what was found: a verdict in words, numbers, trees, reasons, provenance.

The page is one file. Its style, its script and the two libraries that lay out and draw (D3 and
dagre, whose licences it carries) are inlined, its data stands in one JSON block, and its policy
forbids every request, so that it opens offline and tells nobody.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rewrite.outcomes import Change, Skip

if TYPE_CHECKING:
    from rewrite.equivalence.divergence import Divergence
    from rewrite.equivalence.side_by_side import ModuleRow, SideBySide
    from rewrite.equivalence.verification import Case

_LIBRARIES = ("d3", "dagre")


@dataclass(frozen=True)
class Number:
    """A number that stands under the verdict, and what it means."""

    value: str
    what: str


@dataclass(frozen=True)
class Page:
    """What one page shows.

    Attributes:
        title: what was done, to what.
        verdict: one sentence: whether it holds, and in which numbers, or why not.
        ok: whether it holds; None where nothing is judged.
        measured: the numbers of what does not hold, which say little by themselves.
        numbers: what stands under the verdict.
        reasons: what is wrong, one line each.
        divergence: the first place where the models part.
        changes, skips: what each pass did and what it left alone, with the pass before each.
        cases: the inputs that both models ran on.
        notes: what the reader should know beside it.
        modules: both models, module by module.
        names: what the two are called.
        wrong: above which relative error a value counts as off; infinite where none is promised.
        provenance: versions, hashes, command line.
    """

    title: str
    verdict: str
    ok: bool | None
    measured: str = ""
    numbers: Sequence[Number] = ()
    reasons: Sequence[str] = ()
    divergence: Divergence | None = None
    changes: Sequence[tuple[str, Change]] = ()
    skips: Sequence[tuple[str, Skip]] = ()
    cases: Sequence[Case] = ()
    notes: Sequence[str] = ()
    modules: SideBySide | None = None
    names: tuple[str, str] = ("Original", "Rewritten")
    wrong: float = math.inf
    provenance: Mapping[str, str] = field(default_factory=dict)

    def render(self) -> str:
        """Return the page as HTML."""
        import jinja2
        from markupsafe import Markup

        assets = files("rewrite.html") / "assets"

        def raw(name: str) -> Any:
            return Markup(assets.joinpath(name).read_text(encoding="utf-8"))

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string(assets.joinpath("page.html.j2").read_text("utf-8"))
        return template.render(
            page=self._shown(),
            css=raw("page.css"),
            script=raw("page.js"),
            libraries=Markup("\n").join(raw(f"{name}.min.js") for name in _LIBRARIES),
            licences="\n\n".join(f"{name}\n\n{raw(f'{name}.LICENSE.txt')}" for name in _LIBRARIES),
            # The JSON stands in a script element: nothing in it may look like the element's end.
            data=Markup(json.dumps(self._data(), separators=(",", ":")).replace("<", "\\u003c")),
        )

    def _shown(self) -> dict[str, Any]:
        """Return what the template prints without a script."""
        reasons = Counter(skip.reason for _, skip in self.skips)
        depth = self.modules is not None and any(r.error is not None for r in self.modules.after)
        return {
            "title": self.title,
            "verdict": self.verdict,
            "tone": {None: "", True: "good", False: "bad"}[self.ok],
            "measured": self.measured,
            "numbers": self.numbers,
            "reasons": self.reasons,
            "divergence": _divergence(self.divergence),
            "depth": depth,
            "trees": self.modules is not None,
            "names": self.names,
            "changes": [
                {"pass": name, "target": c.target or "(root)", "before": c.before,
                 "after": c.after, "note": c.note}
                for name, c in self.changes
            ],
            "noted": any(change.note for _, change in self.changes),
            "skips": [
                {"pass": name, "target": s.target or "(root)", "before": s.before,
                 "reason": s.reason}
                for name, s in self.skips
            ],
            "skip_reasons": reasons.most_common(),
            "cases": [_case(case) for case in self.cases],
            "notes": self.notes,
            "provenance": self.provenance,
        }  # fmt: skip

    def _data(self) -> dict[str, Any]:
        """Return what the script draws."""
        states: dict[str, dict[str, str]] = {}
        for name, skip in self.skips:
            states[skip.target] = {"did": "skipped", "why": f"{name}: {skip.reason}"}
        for name, change in self.changes:
            shown = {"did": "changed", "change": f"{name}: {change.before} → {change.after}"}
            for touched in (change.target, *change.touched):
                states.setdefault(touched, {"did": "changed", "change": f"touched by {name}"})
            states[change.target] = {**states.get(change.target, {}), **shown}
        found: dict[str, Any] = {
            "states": states,
            "wrong": self.wrong if math.isfinite(self.wrong) else None,
            "names": self.names,
            "first": None if self.divergence is None else self.divergence.target,
        }
        if self.modules is not None:
            found["before"] = [_row(row) for row in self.modules.before]
            found["after"] = [_row(row) for row in self.modules.after]
        return found


def _row(row: ModuleRow) -> dict[str, Any]:
    found = dict(vars(row))
    if row.error is not None and not math.isfinite(row.error):
        found["error"] = 1e300
    return found


def _divergence(found: Divergence | None) -> dict[str, str]:
    if found is None:
        return {}
    out = f"{found.error_out:.1e}" if math.isfinite(found.error_out) else "no counterpart"
    shown = {
        "module": found.target or "the model's own forward",
        "function": found.function,
        "node": found.node,
        "error of what goes in": f"{found.error_in:.1e}",
        "error of what comes out": out,
        "rewritten by": found.rewrite,
        "original": found.source or "",
        "rewritten": found.source_after or "",
        "note": found.note,
    }
    return {name: value for name, value in shown.items() if value}


def _case(case: Case) -> dict[str, Any]:
    mark = "FAIL" if case.failed else "" if case.skipped else "ok"
    error = f"left out: {case.skipped}" if case.skipped else f"{case.max_rel:.1e}"
    return {
        "failed": case.failed, "mark": mark, "name": case.name, "inputs": case.inputs,
        "error": error,
    }  # fmt: skip
