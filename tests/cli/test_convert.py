"""The command `rewrite convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from models.randomize import randomize_norms_
from rewrite.onnx.report import Check, OnnxVerification
from rewrite.protocol import Pass
from tests.cli.running import files, run
from tests.cli.test_common import FACTORY


def test_convert_writes_beside_the_checkpoint_and_prints_each_norm(checkpoint, capsys) -> None:
    code, out, _ = run(
        capsys, "convert", "--bn-to-gn", "--num-groups", "32", checkpoint, "--input", "2x3x12x12"
    )
    assert code == 0
    assert "BatchNorm2d(64)" in out and "GroupNorm(32, 64)" in out
    assert "GroupNorm(7, 7)" in out and "32 groups asked, 7 fit 7 channels" in out
    assert "2 rewritten, 0 left alone" in out and "agreement" in out and "cosine" in out
    assert files(checkpoint.parent) == {"model.pt", "model.rewritten.pt"}
    model = rewrite.load(checkpoint.with_name("model.rewritten.pt"))
    assert type(model[1]) is nn.GroupNorm and type(model[4]) is nn.GroupNorm


def test_only_and_skip_choose_by_qualified_name(checkpoint, capsys) -> None:
    _, out, _ = run(capsys, "convert", "--bn-to-gn", checkpoint, "--only", "1", "--dry-run")
    assert "not matched by --only 1" in out and "1 rewritten, 1 left alone" in out
    _, out, _ = run(capsys, "convert", "--bn-to-gn", checkpoint, "--skip", "[14]", "--dry-run")
    assert "matched by --skip" in out and "0 rewritten, 2 left alone" in out


def test_a_dry_run_writes_nothing(checkpoint, capsys) -> None:
    code, out, _ = run(
        capsys, "convert", "--bn-to-gn", "--num-groups", "32", checkpoint, "--dry-run"
    )
    assert code == 0 and "GroupNorm(32, 64)" in out and "nothing written" in out
    assert files(checkpoint.parent) == {"model.pt"}


def test_quiet_prints_nothing_and_report_is_json(checkpoint, capsys) -> None:
    report = checkpoint.with_name("report.json")
    code, out, err = run(
        capsys,
        "convert",
        "--bn-to-gn",
        checkpoint,
        "--quiet",
        "--report",
        report,
        "--input",
        "1x3x9x9",
    )
    assert (code, out, err) == (0, "", "")
    content = json.loads(report.read_text())
    assert content["ok"] and content["passes"][0]["pass"] == "bn-to-gn"
    assert [c["target"] for c in content["passes"][0]["changes"]] == ["1", "4"]
    assert content["verification"]["cosine"] is not None


def test_an_existing_file_is_kept_without_force(checkpoint, capsys) -> None:
    target = checkpoint.with_name("model.rewritten.pt")
    target.write_text("mine")
    code, _, err = run(capsys, "convert", "--bn-to-gn", checkpoint)
    assert code == 2 and "--force" in err and target.read_text() == "mine"
    assert run(capsys, "convert", "--bn-to-gn", checkpoint, "--force")[0] == 0
    assert target.read_bytes()[:2] == b"PK"


def test_output_elsewhere(checkpoint, capsys, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "out.pt"
    assert run(capsys, "convert", "--bn-to-gn", checkpoint, "-o", target)[0] == 0
    assert files(target.parent) == {"out.pt"}


def test_a_name_is_a_model_too(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "convert", "--verbose", "--bn-to-gn", "torchvision:resnet18", "--input", "1x3x64x64"
    )
    assert code == 0 and "layer4.1.bn2" in out and "20 rewritten" in out
    assert files(tmp_path) == {"resnet18.rewritten.pt"}


def test_a_state_dict_with_a_factory(capsys, tmp_path) -> None:
    from torchvision.models import resnet18

    state = {f"module.{key}": value for key, value in resnet18(num_classes=5).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "train.pth")
    code, out, err = run(
        capsys, "convert", "--bn-to-gn", tmp_path / "train.pth", "--input", "1x3x64x64",
        "--factory", 'torchvision.models:resnet18({"num_classes": 5})',
    )  # fmt: skip
    assert code == 0, err
    assert "20 rewritten" in out and "left out epoch (int)" in err
    # A state dict comes out, and it belongs to the rewritten model.
    written = torch.load(tmp_path / "train.rewritten.pt", weights_only=True)
    assert "a state dict, as" in err and "layer4.1.bn2.weight" in written
    assert not any("running_mean" in key for key in written)


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", None])
def test_a_state_dict_in_is_a_state_dict_out_in_the_form_of_the_suffix(
    capsys, tmp_path, name
) -> None:
    from safetensors.torch import load_file, save_file

    factory = 'torch.nn:Linear({"in_features": 3, "out_features": 2})'
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "m.safetensors")
    code, _, err = run(
        capsys, "convert", "--weight-norm", tmp_path / "m.safetensors", "--factory", factory,
        *(() if name is None else ("-o", tmp_path / name)), "--input", "1x3",
    )  # fmt: skip
    assert code == 0, err
    out = tmp_path / (name or "m.rewritten.safetensors")
    state = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert set(state) >= {"bias"} and "weight" not in state


def test_a_seed_decides_what_a_factory_draws(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = []
    for name, seed in (("a.pt", 1), ("b.pt", 1), ("c.pt", 2)):
        code, _, err = run(
            capsys, "convert", "--weight-norm", FACTORY, "--input", "1x3", "--seed", seed,
            "-o", name, "--quiet",
        )  # fmt: skip
        assert code == 0, err
        written.append(Path(name).read_bytes())
    assert written[0] == written[1] != written[2]


def test_nothing_to_rewrite_is_3_and_0_if_allowed(capsys, tmp_path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.pt")
    code, _, err = run(capsys, "convert", "--bn-to-gn", tmp_path / "m.pt")
    assert code == 3 and "nothing to rewrite" in err
    assert run(capsys, "convert", "--bn-to-gn", tmp_path / "m.pt", "--allow-noop")[0] == 0
    assert files(tmp_path) == {"m.pt"}


def test_a_broken_contract_is_1_and_writes_nothing(checkpoint, capsys, monkeypatch) -> None:
    from passes import BatchNormToGroupNorm
    from rewrite.outcomes import Contract

    monkeypatch.setattr(BatchNormToGroupNorm, "contract", Contract.EXACT_IN_EVAL)
    code, _, err = run(capsys, "convert", "--bn-to-gn", checkpoint)
    assert code == 1 and "contract" in err and files(checkpoint.parent) == {"model.pt"}


def test_a_pass_that_crashes_is_1_and_named(checkpoint, capsys, monkeypatch) -> None:
    from passes import BatchNormToGroupNorm

    def broken(self: object, captured: object, site: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(BatchNormToGroupNorm, "rewrite", broken)
    monkeypatch.setattr(BatchNormToGroupNorm, "rewrite_all", Pass.rewrite_all)
    code, _, err = run(capsys, "convert", "--bn-to-gn", checkpoint)
    assert code == 1 and err == "rewrite: bn-to-gn: 1: oops\n"


def test_the_model_is_quoted_when_it_rejects_an_input(checkpoint, capsys) -> None:
    _, _, err = run(capsys, "convert", "--bn-to-gn", checkpoint, "--input", "1x4x9x9")
    assert "expected input[1, 4, 9, 9] to have 3 channels" in err


@pytest.mark.parametrize(
    ("flag", "name", "said"),
    [
        ("--only", "block.norm9", "--only block.norm9: no pass finds anything of that name; did"),
        ("--skip", "block.nrom1", "did you mean block.norm1"),
        ("--only", "block", "; write 'block.*' for what is below it"),
    ],
)  # fmt: skip
def test_a_name_that_nothing_has_is_an_error(
    capsys, tmp_path: Path, flag: str, name: str, said: str
) -> None:
    model = nn.Sequential()
    model.block = nn.Sequential()
    model.block.conv1, model.block.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    rewrite.save(randomize_norms_(model).eval(), tmp_path / "m.pt")
    place = [str(tmp_path / "m.pt"), "-o", str(tmp_path / "o.pt"), "--input", "1x3x9x9"]
    code, _, err = run(capsys, "convert", "--fold", flag, name, *place)
    assert code == 2 and said in err and not (tmp_path / "o.pt").exists()
    assert run(capsys, "convert", "--fold", "--skip", "head*", *place)[0] == 0


def test_a_low_agreement_says_what_to_do(capsys, model_here: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)]
    torch.manual_seed(1)
    rewrite.save(randomize_norms_(nn.Sequential(*layers)).eval(), "net.pt")
    swap = ["convert", "--bn-to-in", "--keep", "nothing", "net.pt", "-o", "o.pt", "--force"]
    torch.save(torch.randn(64, 3, 9, 9), "own.pt")
    shown = run(capsys, *swap, "--input", "own.pt")[1]
    assert "of 64 (" in shown and "agreement is low: --keep function" in shown
    kept = run(capsys, "convert", "--fold", "net.pt", "-o", "o.pt", "--force", "--input", "own.pt")
    assert "same top-1 as the original: 64 of 64\n" in kept[1] and "is low" not in kept[1]


def test_what_breaks_its_contract_leaves_its_reports_alone(checkpoint, capsys, monkeypatch) -> None:
    from passes import BatchNormToGroupNorm
    from rewrite.outcomes import Contract

    monkeypatch.setattr(BatchNormToGroupNorm, "contract", Contract.EXACT_IN_EVAL)
    monkeypatch.chdir(checkpoint.parent)
    reports = ["--html", "page.html", "--report", "r.json", "--onnx", "o.onnx"]
    code, out, err = run(
        capsys, "convert", "--bn-to-gn", "model.pt", *reports, "--input", "2x3x9x9"
    )
    assert code == 1 and "is not exact-in-eval" in err and "no model was written" in err
    assert files(checkpoint.parent) == {"model.pt", "page.html", "r.json"}
    assert "wrote page.html" in out and "wrote r.json" in out
    page = Path("page.html").read_text(encoding="utf-8")
    assert "The result breaks its contract" in page and "The first place where they part" in page


@pytest.mark.parametrize(
    "command", ["convert --fold --onnx o.onnx model.pt", "export model.pt o.onnx"]
)
def test_a_graph_that_does_not_agree_is_in_the_reports(
    model_here: Path, capsys, monkeypatch, command: str
) -> None:
    wrong = OnnxVerification("o.onnx", (Check("parity", "the output is off by 0.3", ok=False),))
    monkeypatch.setattr("rewrite.onnx.export.verify_onnx", lambda *_, **__: wrong)
    reports = ["--html", "page.html", "--report", "r.json", "--input", "2x3x9x9"]
    code, _, err = run(capsys, *command.split(), *reports)
    assert code == 1 and "off by 0.3; no model was written" in err
    assert files(model_here.parent) == {"model.pt", "page.html", "r.json"}
    page = Path("page.html").read_text(encoding="utf-8")
    verdict = page.split('class="verdict', 1)[1].split("</h1>")[0]
    assert "off by 0.3" in verdict
    assert json.loads(Path("r.json").read_text())["ok"] is False


def test_a_page_of_a_conversion_says_that_the_graph_agrees(model_here: Path, capsys) -> None:
    command = "convert --fold --onnx o.onnx model.pt --input 2x3x9x9 --html page.html"
    assert run(capsys, *command.split())[0] == 0
    assert "parity with the PyTorch model" in Path("page.html").read_text(encoding="utf-8")


def test_a_model_has_not_the_name_of_a_graph(model_here: Path, capsys) -> None:
    code, _, err = run(capsys, "convert", "--fold", "model.pt", "-o", "out.onnx")
    assert code == 2 and "--onnx out.onnx exports it" in err
    assert files(model_here.parent) == {"model.pt"}
