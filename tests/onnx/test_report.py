"""What a verification of a graph says: a verdict, its reasons, JSON without infinities."""

from __future__ import annotations

import json
import math

import pytest

from rewrite.onnx.report import Check, OnnxVerification

GOOD, BAD = Check("runs", "on 2 inputs"), Check("outputs", "off by 0.5", ok=False)


@pytest.mark.parametrize(
    ("checks", "verdict", "ok"),
    [((), "not verified", True), ((GOOD,), "verified", True), ((GOOD, BAD), "wrong", False)],
)
def test_the_verdict_rests_on_what_was_looked_at(
    checks: tuple[Check, ...], verdict: str, ok: bool
) -> None:
    found = OnnxVerification("a.onnx", checks)
    assert (found.verdict, bool(found)) == (verdict, ok)
    assert found.reasons == (() if ok else ("outputs: off by 0.5",))
    assert str(found).splitlines()[0] == f"a.onnx: {verdict}"


def test_numbers_that_json_does_not_know_are_null() -> None:
    found = OnnxVerification("a.onnx", (BAD,), max_abs=math.inf, max_rel=math.nan, noise=0.5)
    data = json.loads(found.to_json())
    assert (data["max_abs"], data["max_rel"], data["noise"]) == (None, None, 0.5)
    assert data["reasons"] == ["outputs: off by 0.5"] and not data["ok"]


def test_the_old_name_of_the_counts_warns() -> None:
    found = OnnxVerification("a.onnx", (GOOD,), {"Conv": 2})
    with pytest.warns(DeprecationWarning, match="census is now operator_counts"):
        assert found.census == {"Conv": 2}
