"""The manners of the command line: version, suggestions, a pass by name, completion, a project's
defaults, JSON, HTML and what --quiet still says.
"""

import sys

import torch
from torch import nn

import rewrite
from models.randomize import randomize_norms_
from tests.cli.running import run


def test_the_version_is_said(capsys) -> None:
    assert run(capsys, "--version") == (0, f"rewrite {rewrite.__version__}\n", "")


def test_a_notebook_shows_little_of_everything() -> None:
    x = torch.randn(2, 3, 9, 9)
    torch.manual_seed(0)
    layers = [layer for _ in range(30) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    model = randomize_norms_(nn.Sequential(*layers)).eval()
    result = rewrite.convert(model, "fold", example_inputs=x)
    check = rewrite.verify(model, result.model, x, level="quick")
    for shown in (result, result.report, check, rewrite.signal(model, x)):
        assert len(repr(shown)) < 300 and "\n" not in repr(shown)
        assert shown._repr_html_().startswith("<")


def test_what_is_not_installed_is_said_with_how_to_install_it(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(capsys, "inspect", "timm:resnet18")
    assert code == 2 and err.endswith("; pip install timm\n")
