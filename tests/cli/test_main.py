"""The command line as a whole: exit codes, MODEL arguments, what --help costs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.running import files, run

_BAD = {
    "missing": ["convert", "--bn-to-gn", "{dir}/none.pt"],
    "empty": ["convert", "--bn-to-gn", "{dir}/empty.pt"],
    "random": ["convert", "--bn-to-gn", "{dir}/random.pt"],
    "text": ["convert", "--bn-to-gn", "{dir}/text.pt"],
    "truncated": ["convert", "--bn-to-gn", "{dir}/truncated.pt"],
    "state dict": ["convert", "--bn-to-gn", "{dir}/state.pt"],
    "no factory": ["convert", "--bn-to-gn", "{dir}/state.pt", "--factory", "nowhere:nothing"],
    "keys": ["convert", "--bn-to-gn", "{dir}/state.pt", "--factory", "torch.nn:Identity"],
    "folder": ["convert", "--bn-to-gn", "{model}", "-o", "{dir}/none/out.pt"],
    "groups": ["convert", "--bn-to-gn", "{model}", "--num-groups", "0"],
    "groups text": ["convert", "--bn-to-gn", "{model}", "--num-groups", "many"],
    "input": ["convert", "--bn-to-gn", "{model}", "--input", "abc"],
    "input rejected": ["convert", "--bn-to-gn", "{model}", "--input", "1x4x9x9"],
    "input file": ["convert", "--bn-to-gn", "{model}", "--input", "{dir}/none.npz"],
    "idle pass": ["convert", "--bn-to-gn", "--bn-to-ln", "{model}"],
    "no pass": ["convert", "{model}"],
    "option of no pass": ["convert", "--bn-to-ln", "--num-groups", "4", "{model}"],
    "unknown flag": ["convert", "--bn-to-xx", "{model}"],
    "report folder": ["convert", "--bn-to-gn", "{model}", "--report", "{dir}/none/report.json"],
    "inspect": ["inspect", "{dir}/random.pt"],
}


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_is_one_line_and_2(case, checkpoint, capsys) -> None:
    folder = checkpoint.parent
    (folder / "empty.pt").touch()
    (folder / "random.pt").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "text.pt").write_text("not a model\n")
    (folder / "truncated.pt").write_bytes(checkpoint.read_bytes()[:2000])
    torch.save(nn.Linear(2, 2).state_dict(), folder / "state.pt")
    before = files(folder)
    code, out, err = run(
        capsys, *(part.format(dir=folder, model=checkpoint) for part in _BAD[case])
    )
    assert code == 2 and "Traceback" not in err and not out
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", "  "))]
    assert len(lines) == 1, err
    assert files(folder) == before


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys\nfrom rewrite.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "slow = {'torch', 'numpy', 'rich', 'importlib.metadata', 'rewrite.files'}\n"
        "assert not slow & set(sys.modules), 'imported too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


def test_importing_the_package_needs_no_torch() -> None:
    code = (
        "import sys, rewrite\nassert 'torch' not in sys.modules\n"
        "assert set(rewrite.__all__) <= set(dir(rewrite))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
