"""What the commands share: MODEL arguments, data of a file, text for a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rewrite
from rewrite.cli.common import default_output, printable
from tests.cli.running import run


def test_inputs_from_files(checkpoint, capsys, tmp_path) -> None:
    np.savez(tmp_path / "batch.npz", x=np.ones((2, 3, 9, 9), np.float32))
    torch.save(torch.ones(2, 3, 9, 9), tmp_path / "batch.pt")
    for name in ("batch.npz", "batch.pt"):
        code, _, err = run(
            capsys, "convert", "--bn-to-gn", checkpoint, "--force", "--input", tmp_path / name
        )
        assert code == 0, err


class Attack:
    """What runs a command when a pickle of it is opened."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> object:
        return open, (self.place, "w")


@pytest.mark.parametrize("flag", ["--calibration", "--input"])
def test_data_are_opened_as_checkpoints_are(checkpoint, capsys, tmp_path, flag) -> None:
    torch.save([Attack(str(tmp_path / "pwned"))], tmp_path / "data.pt")
    code, _, err = run(capsys, "convert", "--bn-to-gn", checkpoint, flag, tmp_path / "data.pt")
    assert code == 2 and "no --trust allows" in err and err.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


FACTORY = 'torch.nn:Linear({"in_features": 3, "out_features": 2})'


def test_key_and_prefix_choose_the_state_dict(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (nn.Linear(3, 2).state_dict() for _ in range(2))
    held = {f"net.{key}": value for key, value in two.items()}
    torch.save({"one": one, "two": held, "best": 0.9}, "gan.pt")
    base = ["convert", "--weight-norm", "gan.pt", "--factory", FACTORY, "--input", "1x3", "-o"]
    code, _, err = run(capsys, *base, "a.pt")
    assert code == 2 and "choose one with --key" in err
    for flags in (["--key", "two"], ["--key", "two", "--strip-prefix", "net."]):
        code, _, err = run(capsys, *base, "a.pt", "--force", *flags)
        assert code == 0, err
        assert "left out one" in err and torch.equal(torch.load("a.pt")["bias"], two["bias"])
    code, _, err = run(capsys, *base, "b.pt", "--key", "two", "--strip-prefix", "model.")
    assert code == 2 and not Path("b.pt").exists()
    code, _, err = run(capsys, *base, "b.pt", "--key", "three")
    assert code == 2 and "those in it: one, two" in err


def test_what_commands_a_terminal_is_made_visible() -> None:
    assert printable("γ 1\n\x1b[31m\x07\u202e") == "γ 1\n\\x1b[31m\\x07\\u202e"


def test_json_is_printed_for_machines(capsys, model_here: Path) -> None:
    code, out, _ = run(capsys, "verify", "model.pt", "model.pt", "--quick", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] is True
    assert found["provenance"]["rewrite"] == rewrite.__version__
    assert found["provenance"]["model.pt"].startswith("sha256 ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "--fold", "model.pt", "--input", "1x3x9x9"],
        ["verify", "model.pt", "model.pt", "--quick"],
        ["compare", "model.pt", "model.pt"],
        ["export", "model.pt", "out.onnx", "--input", "1x3x9x9"],
    ],
)
def test_a_page_is_written(capsys, model_here: Path, arguments: list[str]) -> None:
    assert run(capsys, *arguments, "--html", "page.html")[0] == 0
    text = Path("page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "sha256" in text and "torch" in text


@pytest.mark.parametrize("place", ["elsewhere/model.pt", "elsewhere/"])
def test_a_path_that_leads_nowhere_is_said_of_the_model_not_of_the_output(capsys, place) -> None:
    code, _, err = run(capsys, "convert", "--fold", place)
    assert code == 2 and err.startswith(f"rewrite: {place}: no such file")
    assert "create it" not in err


def test_one_shape_written_with_commas_is_explained(capsys, model_here: Path) -> None:
    code, _, err = run(capsys, "convert", "--fold", "model.pt", "--input", "1,3,9,9")
    assert code == 2 and "these are 4, and the model takes 1; write one as 1x3x9x9\n" in err


def test_json_is_all_that_is_printed(capsys, model_here: Path) -> None:
    for command in (
        ["convert", "--fold", "model.pt", "--dry-run"],
        ["convert", "--fold", "model.pt", "-o", "o.pt", "--onnx", "o.onnx", "--input", "1x3x9x9"],
        ["compare", "model.pt", "model.pt"],
        ["inspect", "model.pt"],
    ):
        code, out, err = run(capsys, *command, "--json")
        found = json.loads(out)
        assert (code, err) == (0, "") and found["provenance"]["rewrite"] == rewrite.__version__


@pytest.mark.parametrize("command", ["inspect model.pt", "recover model.pt --teacher a --data b"])
def test_a_command_without_a_page_has_no_flag_for_one(capsys, command: str) -> None:
    code, _, err = run(capsys, *command.split(), "--html", "page.html")
    assert code == 2 and "unrecognized arguments: --html page.html; it is a flag of" in err


def test_an_export_without_an_input_says_for_which(capsys, model_here: Path) -> None:
    code, out, _ = run(capsys, "export", "model.pt", "o.onnx")
    assert code == 0 and "note: no input was given: exported for 1x3x224x224" in out


def test_a_reference_may_be_longer_than_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    reference = 'torch.nn:Linear({"in_features": 3, "out_features": 2' + " " * 300 + "})"
    assert run(capsys, "inspect", reference, "--quiet")[0] == 0


def test_without_a_name_the_output_lies_beside_its_file_or_here_for_a_name(tmp_path: Path) -> None:
    for name in ("m.pt", "m.safetensors", "m.pt2"):
        (tmp_path / name).touch()
    for reference, output in (
        (tmp_path / "m.pt", tmp_path / "m.recovered.pt"),
        (tmp_path / "m.pt2", tmp_path / "m.recovered.pt"),
        (tmp_path / "m.safetensors", tmp_path / "m.recovered.safetensors"),
        ("timm:resnet18", "resnet18.recovered.pt"),
        ("elsewhere/net.pt/", "net.pt.recovered.pt"),
        ('torch.nn:Linear({"in_features": 3})', "Linear.recovered.pt"),
    ):
        assert default_output(str(reference), "recovered") == Path(output)
