"""Ctrl-C at any moment of any command: one line, exit code 130, and no new file; or it is done.

`recover` that has begun to train writes the best state that it had.

One process imports everything and forks a child for each trial, which is interrupted after a random
share of the time that the command takes when it is left alone.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
import rewrite
from rewrite.cli import main as command
from rewrite.cli.main import main

COMMANDS = {
    "convert": "convert --fold model.pt -o out.pt --html out.html --report out.json",
    "convert and export": "convert --bn-to-gn model.pt -o out.pt --onnx out.onnx --input 2x3x32x32",
    "verify": "verify model.pt model.pt --input 2x3x32x32 --html out.html",
    "export": "export model.pt out.onnx --input 2x3x32x32 --exporter torchscript --report o.json",
    "inspect": "inspect --signal model.pt --input 2x3x32x32 --report out.json --plot out.svg",
    "compare": "compare model.pt model.pt --input 2x3x32x32 --html out.html",
    "recover": "recover model.pt --teacher model.pt --data data.npy --epochs 2 -o out.pt",
}
TRIALS = 2
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forked(arguments: list[str], folder: Path, after: float | None) -> tuple[int, str, float]:
    """Run a command in a child, interrupt it; return exit code, standard error and seconds."""
    begin = time.monotonic()
    log = folder.parent / "stderr.txt"
    started, starts = os.pipe()
    if (child := os.fork()) == 0:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for stream, name in ((1, os.devnull), (2, str(log))):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.chdir(folder)
            # The first that a command does: an interrupt before it would be none of the command.
            parser = command._parser
            command._parser = lambda argv: os.write(starts, b"!") and parser(argv)
            code = main(arguments)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.read(started, 1)  # what comes before the command is not interrupted
    os.close(started), os.close(starts)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGINT)  # a child that is done waits to be asked for its status
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), log.read_text(), time.monotonic() - begin


def trials(folder: Path) -> dict[str, list[Any]]:
    """Return for each command the code of a whole run, and what became of the interrupted ones."""
    before, chance = contents(folder), random.Random(0)
    found: dict[str, list[Any]] = {}
    for name, line in COMMANDS.items():
        code, said, whole = forked(line.split(), folder, None)
        made = sorted(set(contents(folder)) - set(before))
        found[name] = [[code, said, made]]
        for path in made:
            (folder / path).unlink()
        for _ in range(TRIALS):
            code, said, _ = forked(line.split(), folder, whole * chance.uniform(0.02, 0.7))
            left = sorted(name for name in contents(folder) if name not in before)
            for path in left:
                (folder / path).unlink()
            assert contents(folder) == before
            found[name].append([code, said, left])
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("interrupt") / "work"
    folder.mkdir()
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    rewrite.save(models.randomize_norms_(model).eval(), folder / "model.pt")
    np.save(folder / "data.npy", torch.randn(64, 3, 32, 32).numpy())
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(folder)
    loaded: dict[str, list[Any]] = json.loads(ran.stdout)
    return loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_so_in_one_line_and_writes_nothing(
    outcomes: dict[str, list[Any]], name: str
) -> None:
    (code, said, made), *interrupted = outcomes[name]
    assert code == 0, said
    for code, said, left in interrupted:
        assert "Traceback" not in said
        if code == 0:  # it came too late: the files had got their names, all of them
            assert left == made
            continue
        assert code == 130, said
        last = said.splitlines()[-1]
        assert last.startswith("rewrite: interrupted"), said
        kept = name == "recover" and last.endswith("; wrote the best state to out.pt")
        assert left == (made if kept else []), said


@pytest.mark.parametrize("command", ["recover", "convert"])
def test_an_interrupted_training_writes_its_best_state_and_a_conversion_nothing(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = models.randomize_norms_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))).eval()
    path, data, out = tmp_path / "model.pt", tmp_path / "data.npy", tmp_path / "out.pt"
    rewrite.save(model, path)
    np.save(data, torch.randn(64, 3, 8, 8).numpy())
    monkeypatch.setattr("rewrite.progress.ProgressLine.__call__", interrupt_at_step_3)
    arguments = {
        "recover": ["recover", path, "--teacher", path, "--data", data, "-o", out, "--epochs", 9],
        "convert": ["convert", path, "--bn-to-gn", "--recover", data, "-o", out],
    }[command]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([str(word) for word in arguments]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err.splitlines()[-1]
    if command == "recover":
        assert said == f"rewrite: interrupted after step 3; wrote the best state to {out}"
        assert rewrite.load(out).state_dict().keys() == model.state_dict().keys()
    else:
        assert said == "rewrite: interrupted; nothing was written" and not out.exists()


def interrupt_at_step_3(_: object, line: str) -> None:
    if line.startswith("step 3 "):
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    import jinja2  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import onnxscript  # noqa: F401
    import torch.onnx._internal.exporter._compat

    import rewrite.onnx.export
    import rewrite.onnx.verify
    import rewrite.training.recover

    sys.stdout.write(json.dumps(trials(Path(sys.argv[1]))))
