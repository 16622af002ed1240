from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
import rewrite
from rewrite.cli.main import main
from rewrite.protocol import Pass


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a pickled model: two BatchNorms, 64 and 7 channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 7, 3), nn.BatchNorm2d(7)
    )
    path = tmp_path / "model.pt"
    torch.save(models.randomize_norms_(model.eval(), 0), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


@pytest.mark.parametrize(
    ("flag", "after"),
    [
        (["--bn-to-ln"], "GroupNorm(1, 64)"),
        (["--bn-to-ln", "--over", "c"], "ChannelLayerNorm(64)"),
        (["--bn-to-in"], "InstanceNorm2d(64)"),
        (["--bn-to-gn", "--num-groups", "16"], "GroupNorm(16, 64)"),
        (["--num-groups", "16", "--bn-to-gn"], "GroupNorm(16, 64)"),
        (["--pass", "bn-to-gn{channels_per_group=8}"], "GroupNorm(8, 64)"),
    ],
)
def test_pass_flags_and_their_options(checkpoint, capsys, flag, after) -> None:
    code, out, _ = run(capsys, "convert", "--verbose", *flag, checkpoint, "--input", "2x3x12x12")
    assert code == 0 and after in out


def test_a_flag_never_swallows_the_path(checkpoint, capsys) -> None:
    for position in (("--bn-to-gn", checkpoint), (checkpoint, "--bn-to-gn")):
        assert run(capsys, "convert", *position, "--force", "--quiet")[0] == 0


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


def test_inputs_from_files(checkpoint, capsys, tmp_path) -> None:
    np.savez(tmp_path / "batch.npz", x=np.ones((2, 3, 9, 9), np.float32))
    torch.save(torch.ones(2, 3, 9, 9), tmp_path / "batch.pt")
    for name in ("batch.npz", "batch.pt"):
        code, _, err = run(
            capsys, "convert", "--bn-to-gn", checkpoint, "--force", "--input", tmp_path / name
        )
        assert code == 0, err


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


# -- exit codes -------------------------------------------------------------------------------


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


def test_the_model_is_quoted_when_it_rejects_an_input(checkpoint, capsys) -> None:
    _, _, err = run(capsys, "convert", "--bn-to-gn", checkpoint, "--input", "1x4x9x9")
    assert "expected input[1, 4, 9, 9] to have 3 channels" in err


# -- inspect, passes, help --------------------------------------------------------------------


def test_inspect_shows_norms_feeders_modes_and_passes(checkpoint, capsys) -> None:
    code, out, _ = run(capsys, "inspect", checkpoint)
    assert code == 0
    assert "BatchNorm2d" in out and "0 (Conv2d)" in out and "running" in out
    assert "eval mode" in out and "float32" in out and "bn-to-gn" in out


def test_inspect_names_opaque_modules_and_the_line_that_stopped_the_tracer(capsys) -> None:
    code, out, _ = run(capsys, "inspect", "models.control:BranchingLeaf")
    assert code == 0 and "control.py:" in out and "Opaque" in out


def test_passes_lists_options_and_contracts(capsys) -> None:
    code, out, _ = run(capsys, "passes")
    assert code == 0 and "bn-to-gn" in out and "approximate" in out
    code, out, _ = run(capsys, "passes", "bn-to-gn")
    assert code == 0 and "approximate" in out and "--num-groups" in out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom rewrite.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules), 'imported too much'"
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
