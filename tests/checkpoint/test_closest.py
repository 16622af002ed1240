"""What a MODEL reference that leads nowhere probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import run


def test_a_mistyped_file_is_found(capsys, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model.pt").touch()
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "inspect", "mdoel.pt")
    assert code == 2 and err.endswith("; did you mean model.pt?\n")
    assert "did you mean" not in run(capsys, "inspect", "quite-another.pt")[2]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("timm:resnett18", "did you mean resnet18"),
        ("torchvision:resnet81", "did you mean resnet"),
        ("mobilenetv3_small_050", "did you mean timm:mobilenetv3_small_050?"),
    ],
)
def test_a_mistyped_model_of_a_library_is_found(capsys, name: str, meant: str) -> None:
    code, _, err = run(capsys, "inspect", name)
    assert code == 2 and meant in err and err.count("\n") == 1
