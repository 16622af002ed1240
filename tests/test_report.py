"""A report: its verdict in one line, as data, as a table, and what to do about a low agreement."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rewrite.equivalence.verification import Level, Verification
from rewrite.onnx.report import Check, OnnxVerification
from rewrite.outcomes import Change, Contract, Skip
from rewrite.report import PassReport, Report, advice

HOLDS = Verification(Contract.APPROXIMATE, Level.QUICK, 0.0, 0.0, agreement=1.0, predictions=4)
BROKEN = replace(HOLDS, contract=Contract.EXACT, reasons=("given: off by 0.1",))
CHANGES = tuple(Change(f"layer.{n}.bn", "BatchNorm2d(8)", "GroupNorm(1, 8)") for n in range(12))
PASS = PassReport("bn-to-gn", "approximate", CHANGES, (Skip("", "Norm", "is lazy"),), 0.1)


@pytest.mark.parametrize(
    ("report", "failure"),
    [
        (Report((PASS,)), ""),
        (Report((replace(PASS, violations=("fc.weight",)),)),
         "bn-to-gn: fc.weight changed although no rewritten site names it"),
        (Report((replace(PASS, contract="exact", verification=BROKEN),)),
         "bn-to-gn is not exact: given: off by 0.1"),
        (Report((PASS,), verification=BROKEN), "all passes together: given: off by 0.1"),
        (Report((PASS,), exported=OnnxVerification("a.onnx", (Check("runs", "no", ok=False),))),
         "a.onnx does not agree with the model: runs: no"),
    ],
)  # fmt: skip
def test_the_first_broken_contract_is_the_failure(report: Report, failure: str) -> None:
    assert report.failure == failure
    assert report.ok is (not failure)
    assert json.loads(report.to_json())["ok"] is report.ok


def test_alike_rows_are_one_and_the_root_has_a_name() -> None:
    text = str(Report((PASS,)))
    assert "12 alike" in text and text.count("GroupNorm") == 1
    assert "(root)" in text and "left alone: is lazy" in text
    assert "12 rewritten, 1 left alone" in text


@pytest.mark.parametrize(
    ("share", "notes", "of_users", "fits", "said"),
    [
        (0.99, (), True, True, ""),
        (0.5, (), False, True, "measure on your own data"),
        (0.5, (), True, True, "--keep function"),
        (0.5, (), True, False, "`rewrite recover` trains on your data"),
        (0.5, ("on 8 held-out samples: cosine 0.5",), True, True, ""),
        (None, (), True, True, ""),
    ],
)
def test_advice_is_given_where_little_agrees_and_nothing_better_is_known(
    share: float | None, notes: tuple[str, ...], of_users: bool, fits: bool, said: str
) -> None:
    found = advice(replace(HOLDS, agreement=share), notes, of_users=of_users, fits=fits)
    assert bool(found) is bool(said)
    assert all(said in line for line in found)
    exact = replace(BROKEN, agreement=share)
    assert not advice(exact, notes, of_users=of_users, fits=fits)
