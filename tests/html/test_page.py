"""The HTML page as text: whole, offline, escaped, and saying what the report says."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import models
import rewrite
from benchmarks.html_report import terminal
from rewrite.equivalence.side_by_side import of_runs, side_by_side
from rewrite.html.page import Page
from rewrite.html.pages import comparison_page, conversion_page, onnx_page, verification_page
from rewrite.outcomes import Skip
from rewrite.runtime.inputs import Inputs

X = torch.randn(2, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    return models.randomize_norms_(model).eval()


def data_of(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    loaded: dict[str, object] = json.loads(found[1])
    return loaded


def test_a_conversion_says_what_it_did_and_why_not() -> None:
    model = network()
    result = rewrite.convert(model, "fold", example_inputs=X)
    text = result.report.to_html(model, result.model, X)
    assert "1 site rewritten; exact-in-eval holds" in text
    for skip in result.report.skips:
        assert skip.reason.split("'")[0].split('"')[0].split("<")[0] in text
    data = data_of(text)
    assert {row["name"] for row in data["after"]} == {"", "0", "1", "2", "3"}  # type: ignore[index,attr-defined]
    assert data["states"]["1"]["did"] == "changed"  # type: ignore[index]
    assert data["states"]["3"]["did"] == "skipped"  # type: ignore[index]


def test_a_page_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    result = rewrite.convert(network(), "fold", example_inputs=X)
    found = {number.what: number.value for number in conversion_page(result.report).numbers}
    assert found["to rewrite"].endswith("s") and found["to verify"].endswith("s")
    check = rewrite.verify(network(), result.model, X, level="quick")
    assert [n.what for n in verification_page(check).numbers] == ["to verify"]


def test_two_runs_have_the_same_page_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    pages = set()
    for _ in range(2):
        result = rewrite.convert(network(), "fold", example_inputs=X)
        pages.add(result.report.to_html(network(), result.model, (X,)))
    assert len(pages) == 1 and "to verify" not in pages.pop()


def test_a_report_alone_has_a_page_too() -> None:
    report = rewrite.convert(network(), "fold", example_inputs=X).report
    text = report.to_html()
    assert 'id="modules"' not in text and 'id="skips"' in text


def test_nothing_leaves_the_page() -> None:
    text = rewrite.convert(network(), "fold", example_inputs=X).report.to_html()
    assert "default-src 'none'" in text
    shown = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.S)
    assert not re.search(r"""(src|href|action)=(?!["']data:,)""", shown)
    assert "url(" not in text[text.index("<style>") : text.index("</style>")]


def test_text_of_a_model_is_never_markup() -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    skip = Skip(bad, bad, bad)
    text = Page(title=bad, verdict=bad, ok=False, skips=[(bad, skip)], reasons=[bad]).render()
    assert "<img" not in text and "</script><" not in text.replace("</script>\n<", "")
    assert data_of(text)["states"] == {bad: {"did": "skipped", "why": f"{bad}: {bad}"}}


def test_a_failed_verification_opens_with_where_it_failed() -> None:
    model = network()
    wrong = network()
    with torch.no_grad():
        wrong[1].bias[0] += 0.5
    found = rewrite.verify(model, wrong, X, level="quick")
    text = verification_page(found).render()
    assert "does not hold" in text and text.index('id="divergence"') < text.index('id="cases"')
    assert found.divergence is not None and found.divergence.target in text


def test_a_graph_has_a_page(tmp_path: object) -> None:
    path = f"{tmp_path}/model.onnx"
    found = rewrite.export(network(), path, example_inputs=X)
    text = onnx_page(found).render()
    assert "verified" in text and "Conv" in text


def test_licences_stand_in_the_page() -> None:
    text = rewrite.convert(network(), "fold", example_inputs=X).report.to_html()
    assert "Mike Bostock" in text and "Chris Pettitt" in text


@pytest.mark.parametrize("cell", ["repr", "html"])
def test_a_notebook_shows_little(cell: str) -> None:
    result = rewrite.convert(network(), "fold", example_inputs=X)
    shown = repr(result.report) if cell == "repr" else result.report._repr_html_()
    assert "rewritten" in shown and len(shown) < 2000


def test_a_page_costs_no_run_where_the_values_were_compared() -> None:
    model = network()
    result = rewrite.convert(model, "fold", example_inputs=X)
    ran: list[str] = []
    for each in (model, result.model):
        each.register_forward_pre_hook(lambda *_: ran.append("once"))
    rows = data_of(result.report.to_html(model, result.model, X))["after"]
    assert ran == []
    assert max(row["error"] or 0.0 for row in rows) < 1e-6  # type: ignore[attr-defined]


def test_a_page_runs_both_where_no_value_was_compared() -> None:
    model = network()
    result = rewrite.convert(model, "bn-to-gn", example_inputs=X)
    rows = data_of(result.report.to_html(model, result.model, X))["after"]
    assert max(row["error"] or 0.0 for row in rows) > 1e-3  # type: ignore[attr-defined]


def test_the_run_on_which_two_models_part_is_the_one_that_is_shown() -> None:
    model, wrong = network(), network()
    with torch.no_grad():
        wrong[0].weight[0, 0, 0, 0] += 0.5
    blind = torch.zeros(2, 3, 8, 8)
    batches = [blind, X]
    found = rewrite.verify(model, wrong, calibration=batches, level="thorough")
    assert not found.ok
    text = verification_page(found, of_runs(model, wrong, found.runs)).render()
    assert max(row["error"] or 0.0 for row in data_of(text)["after"]) > 1e-3  # type: ignore[attr-defined]


def test_a_module_takes_few_bytes_and_alike_rows_few_lines() -> None:
    """The limits of `python -m benchmarks.html_report`, on a model that is quickly converted."""
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    sizes = []
    for count in (10, 110):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), *(copy.deepcopy(block) for _ in range(count)))
        models.randomize_norms_(model).eval()
        result = rewrite.convert(model, "fold", example_inputs=X)
        sizes.append(len(result.report.to_html(model, result.model, X).encode()))
        assert len(terminal(result.report).splitlines()) <= 60
    assert (sizes[1] - sizes[0]) / 400 < 600
    assert sizes[0] < 600_000


def test_notes_that_are_alike_are_one() -> None:
    notes = tuple(f"Block.reset() reads layer{n}.bn, which changed" for n in range(1, 60))
    report = rewrite.Report((), notes)
    assert "note: Block.reset() reads layer{1..59}.bn, which changed  59 alike" in str(report)
    assert conversion_page(report).notes == [
        "Block.reset() reads layer{1..59}.bn, which changed (59 alike)"
    ]


def test_the_colour_of_a_verdict_is_that_of_what_was_judged() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(1, 2, 3, 3)
    judged = rewrite.convert(model, "fold", example_inputs=x).report
    unverified = rewrite.convert(model, "fold", verify=False).report
    nothing = rewrite.convert(nn.Linear(2, 2).eval(), "fold", example_inputs=x[0, 0, :, :2]).report
    assert [conversion_page(r).ok for r in (judged, unverified, nothing)] == [True, None, None]
    side = side_by_side(model, model, Inputs.of(x))
    page = comparison_page(side, {}, ("a.pt", "b.pt"))
    text = page.render()
    assert page.ok is None and '<h1 class="verdict ">' in text
    assert '<h3 id="before-name">a.pt</h3>' in text and "comparison of a.pt and b.pt" in text
