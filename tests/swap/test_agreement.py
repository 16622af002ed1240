"""How a converted model agrees with the original on samples that no fit has seen."""

from __future__ import annotations

from passes import BatchNormToGroupNorm
from rewrite.swap.agreement import Agreement
from tests.swap.test_swap import batches, convert, network


def test_the_report_says_what_was_done_and_measured() -> None:
    result = convert(network(), BatchNormToGroupNorm(keep="function", num_groups=2), batches())
    first = result.report.changes[0]
    assert set(first.touched) >= {"0", "1"} and "factors and β fitted" in first.note
    assert 0 < first.metrics["error"] < 1 and first.metrics["correlation"] > 0.5
    assert any("held-out calibration samples" in note for note in result.report.notes)


def test_poor_agreement_is_said_in_a_plain_sentence() -> None:
    layers = {name: {"error_added": added} for name, added in (("a", 0.1), ("b", 0.7))}
    poor = Agreement(20, 0.6, 0.8, 0.5, layers).sentences()
    assert "does not agree well" in poor[-1] and "b, a" in poor[-1]
    good = Agreement(20, 0.99, 0.999, 0.05, layers).sentences()
    assert not any("does not agree" in line for line in good)
    assert "too few" in Agreement(0).sentences()[0]
