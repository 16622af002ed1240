"""Files that version 0.1.0 wrote open in today's code, and compute what they computed then."""

import json
from pathlib import Path

import pytest
import torch

import rewrite

FOLDER = Path(__file__).parent / "fixtures" / "written_by_0_1"
ANSWERS = torch.load(FOLDER / "answers.pt", weights_only=True)


def path_of(name: str) -> Path:
    return FOLDER / ("exported.pt2" if name == "exported" else f"{name}.pt")


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_file_written_before_opens_and_computes_the_same(name: str) -> None:
    given, expected = ANSWERS[name]
    model = rewrite.load(path_of(name)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ANSWERS) - {"exported"}))
def test_a_file_written_before_is_written_anew(name: str, tmp_path: Path) -> None:
    given, expected = ANSWERS[name]
    rewrite.save(rewrite.load(path_of(name)), tmp_path / "again.pt")
    model = rewrite.load(tmp_path / "again.pt").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(given), expected, rtol=1e-5, atol=1e-6)


def test_a_key_map_written_before_folds_another_checkpoint() -> None:
    from rewrite.fold.replay import apply_report

    report = json.loads((FOLDER / "key_map.json").read_text())
    before = torch.load(FOLDER / "key_map_before.pt", weights_only=True)
    expected = torch.load(FOLDER / "key_map_after.pt", weights_only=True)
    folded = apply_report(report, before)
    assert set(folded) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(folded[key], tensor, rtol=1e-6, atol=1e-7)
