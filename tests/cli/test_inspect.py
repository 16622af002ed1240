"""The command `rewrite inspect`."""

from __future__ import annotations

import subprocess
import sys

from tests.cli.running import run

OWN_LAYER = "import torch\nclass Twice(torch.nn.Linear):\n    pass\n"


def test_trust_opens_a_class_of_the_current_folder(tmp_path) -> None:
    (tmp_path / "own_layers.py").write_text(OWN_LAYER)
    make = "import own_layers, torch; torch.save(own_layers.Twice(2, 2), 'own.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    (tmp_path / "transformers.py").write_text("open('ran', 'w')")

    def inspect(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rewrite", "inspect", "own.pt", *flags],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    refused = inspect()
    assert refused.returncode == 2 and "--trust own_layers" in refused.stderr
    assert inspect("--trust", "own_layers").returncode == 0
    # `python -m` puts the current folder first; nothing of it may run for that.
    assert not (tmp_path / "ran").exists()


def test_inspect_shows_norms_feeders_modes_and_passes(checkpoint, capsys) -> None:
    code, out, _ = run(capsys, "inspect", checkpoint)
    assert code == 0
    assert "BatchNorm2d" in out and "0 (Conv2d)" in out and "running" in out
    assert "eval mode" in out and "float32" in out and "bn-to-gn" in out


def test_inspect_names_opaque_modules_and_the_line_that_stopped_the_tracer(capsys) -> None:
    code, out, _ = run(capsys, "inspect", "models.control:BranchingLeaf")
    assert code == 0 and "control.py:" in out and "Opaque" in out


def test_one_thing_is_looked_at_at_a_time(checkpoint, capsys) -> None:
    code, _, err = run(capsys, "inspect", "--balance", "--signal", checkpoint)
    assert code == 2 and "not allowed with argument --balance" in err
