"""Every example runs as it stands."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from rewrite import Change, Site
from rewrite.graph import Editable

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")


def test_a_pass_that_cannot_fit_is_not_told_to() -> None:
    names = runpy.run_path(str(EXAMPLES[0].parent / "own_pass.py"), run_name="imported")
    assert "result" not in names  # a pass that is imported runs nothing

    class Worse(names["HardswishToSilu"]):
        def rewrite(self, captured: Editable, site: Site) -> Change:
            captured.editor.replace(site.target, nn.Hardtanh(0.0, 0.1))
            return Change(site.target, site.before, "Hardtanh")

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 8)).eval()
    result = rewrite.convert(net, [Worse()], example_inputs=torch.randn(64, 8))
    (note,) = [note for note in result.report.notes if "agreement is low" in note]
    assert "rewrite recover" in note and "--keep" not in note


def test_the_index_names_every_example() -> None:
    index = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if path.name not in index] == []
