"""The manners of the command line: version, suggestions, a pass by name, completion, a project's
defaults, JSON, HTML and what --quiet still says.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rewrite
from models.randomize import randomize_norms_
from rewrite.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    rewrite.save(randomize_norms_(model).eval(), tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model.pt"


def test_the_version_is_said(capsys) -> None:
    assert run(capsys, "--version") == (0, f"rewrite {rewrite.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["convrt"], "did you mean convert?"),
        (["convert", "--bn-to-gm", "m.pt"], "did you mean --bn-to-gn"),
        (["convert", "--bn-to-gn", "--num-gruops", "3", "m.pt"], "did you mean --num-groups"),
        (["passes", "fld"], "did you mean fold?"),
        (["verify", "a", "b", "--contract", "exat"], "did you mean exact"),
        (["convert", "--reinit", "kaimng", "m.pt"], "did you mean kaiming"),
    ],
)
def test_what_was_probably_meant_is_said(capsys, arguments: list[str], meant: str) -> None:
    code, _, said = run(capsys, *arguments)
    assert code == 2 and meant in said


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


def test_nothing_is_suggested_for_what_is_like_nothing(capsys) -> None:
    assert "did you mean" not in run(capsys, "xyzzy")[2]


def test_one_pass_is_shown_with_its_options_and_an_example(capsys) -> None:
    code, out, _ = run(capsys, "passes", "bn-to-gn")
    assert code == 0 and "--num-groups (int" in out and "rewrite convert --bn-to-gn" in out
    assert "rewrite convert --reinit" in run(capsys, "passes", "reinit")[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_is_printed(capsys, shell: str) -> None:
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0 and "_ARGCOMPLETE" in out and "rewrite" in out


def test_commands_are_completed() -> None:
    line = "rewrite conv"
    code = (
        "import os, sys\n"
        "line, out = sys.argv[1:]\n"
        "os.environ.update(_ARGCOMPLETE='1', COMP_LINE=line, COMP_POINT=str(len(line)))\n"
        "os.environ['_ARGCOMPLETE_STDOUT_FILENAME'] = out\n"
        "from rewrite.cli.main import main\nmain([])\n"
    )
    out = Path("completed.txt")
    try:
        subprocess.run([sys.executable, "-c", code, line, str(out)], check=False, timeout=60)
        assert out.read_text().strip() == "convert"
    finally:
        out.unlink(missing_ok=True)


def test_a_project_has_defaults_that_the_command_line_overrides(capsys, checkpoint: Path) -> None:
    config = checkpoint.with_name("pyproject.toml")
    config.write_text('[tool.rewrite.verify]\ninput = "1x4x9x9"\n')
    code, _, said = run(capsys, "verify", "model.pt", "model.pt")
    assert code == 2 and "1x4x9x9" in said
    assert run(capsys, "verify", "model.pt", "model.pt", "--input", "1x3x9x9")[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.rewrite.verfy]\nquick = true", "is no command; did you mean verify?"),
        ("[tool.rewrite.verify]\nquik = true", "did you mean quick?"),
        ("[tool.rewrite.verify]\nquick = 3", "does not fit --quick"),
        ('[tool.rewrite]\nseed = "x"', "does not fit --seed"),
        ("[tool.rewrite", "cannot be read"),
        ('[tool.rewrite]\ntrust = ["evil"]', "what code runs"),
        ('[tool.rewrite.verify]\nfactory = "evil:build"', "what code runs"),
        ('[tool.rewrite.convert]\ncalibration = "evil:data"', "what code runs"),
        ("[tool.rewrite.convert]\nforce = true", "what is replaced"),
    ],
)
def test_a_wrong_default_is_one_line(capsys, checkpoint: Path, text: str, said: str) -> None:
    checkpoint.with_name("pyproject.toml").write_text(text)
    code, out, err = run(capsys, "verify", "model.pt", "model.pt")
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_a_pyproject_without_our_table_is_left_alone(capsys, checkpoint: Path) -> None:
    checkpoint.with_name("pyproject.toml").write_text("[tool.other]\nseed = 'x'\n")
    assert run(capsys, "verify", "model.pt", "model.pt", "--quick", "--quiet")[0] == 0


def test_json_is_printed_for_machines(capsys, checkpoint: Path) -> None:
    code, out, _ = run(capsys, "verify", "model.pt", "model.pt", "--quick", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] is True
    assert found["provenance"]["rewrite"] == rewrite.__version__
    assert found["provenance"]["model.pt"].startswith("sha256 ")


def test_quiet_prints_the_line_that_failed(capsys, checkpoint: Path) -> None:
    model = rewrite.load(checkpoint)
    with torch.no_grad():
        model[0].weight[0] += 0.1
    rewrite.save(model, "other.pt")
    code, out, err = run(capsys, "verify", "model.pt", "other.pt", "--quick", "--quiet")
    assert ((code, out, err.count("\n")) == (1, "", 1) and "off by" in err) or "differs by" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "--fold", "model.pt", "--input", "1x3x9x9"],
        ["verify", "model.pt", "model.pt", "--quick"],
        ["compare", "model.pt", "model.pt"],
    ],
)
def test_a_page_is_written(capsys, checkpoint: Path, arguments: list[str]) -> None:
    assert run(capsys, *arguments, "--html", "page.html")[0] == 0
    text = Path("page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "sha256" in text and "torch" in text


def test_a_page_takes_no_other_files_place(capsys, checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    code, _, err = run(capsys, "verify", "model.pt", "model.pt", "--html", "model.pt")
    assert code == 2 and "--html model.pt: is model.pt" in err and checkpoint.read_bytes() == before


def test_compare_names_what_differs(capsys, checkpoint: Path) -> None:
    assert run(capsys, "convert", "--fold", "model.pt", "--input", "1x3x9x9")[0] == 0
    code, out, _ = run(capsys, "compare", "model.pt", "model.rewritten.pt", "--input", "1x3x9x9")
    assert code == 0 and "BatchNorm2d  Identity" in out and "1 of 5 modules differ" in out


def test_signal_makes_up_an_input(capsys, checkpoint: Path) -> None:
    code, out, _ = run(capsys, "inspect", "--signal", "model.pt")
    assert code == 0 and "grad std" in out


@pytest.mark.parametrize("flag", ["--signal", "--balance"])
def test_a_plot_that_cannot_be_drawn_stops_before_the_work(
    capsys, monkeypatch, tmp_path: Path, flag: str
) -> None:
    """The model does not even exist: it was not opened."""
    place = ["inspect", flag, str(tmp_path / "none.pt"), "--plot"]
    code, _, err = run(capsys, *place, str(tmp_path / "a.jpg"))
    assert code == 2 and "a plot is a .png or .svg file" in err
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "rewrite.signals.plot.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    code, _, err = run(capsys, *place, str(tmp_path / "a.svg"))
    assert (code, err) == (2, "rewrite: plots need matplotlib; pip install matplotlib\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_flags(tmp_path: Path) -> None:
    script = tmp_path / "complete.sh"
    script.write_text(
        f"rewrite() {{ '{sys.executable}' -m rewrite \"$@\"; }}; export -f rewrite\n"
        "source <(rewrite completion bash)\n"
        "try() { COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_LINE=$1\n"
        'COMP_POINT=${#1}; COMPREPLY=(); _python_argcomplete rewrite; echo "${COMPREPLY[@]}"; }\n'
        "try 'rewrite com'\ntry 'rewrite convert --bn-to-g'\n"
    )
    ran = subprocess.run(["bash", script], capture_output=True, text=True, check=False, timeout=120)
    assert [line.split() for line in ran.stdout.splitlines()] == [
        ["compare", "completion"], ["--bn-to-gn"],
    ], ran.stderr  # fmt: skip


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


def test_the_bare_command_shows_what_there_is(capsys) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and "verify" in err and "hold a model to another" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "--fold"], "required: MODEL; rewrite convert --help shows what it takes\n"),
        (["convert", "fold", "m.pt"], "unrecognized arguments: m.pt; did you mean --fold?\n"),
        (["inspect", "--only", "bn1", "m.pt"], "; it is a flag of rewrite convert\n"),
        (["convert", "--num-groups", "4", "m.pt"],
         "; it is an option of --bn-to-gn, and stands behind it\n"),
        (["inspect", "--outptu", "a", "m.pt"], "--outptu m.pt; rewrite inspect --help"),
    ],
)  # fmt: skip
def test_a_wrong_usage_is_one_line_that_leads_on(capsys, arguments, said) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_a_mistyped_file_is_found(capsys, checkpoint: Path) -> None:
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


def test_what_is_not_installed_is_said_with_how_to_install_it(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(capsys, "inspect", "timm:resnet18")
    assert code == 2 and err.endswith("; pip install timm\n")


def test_one_shape_written_with_commas_is_explained(capsys, checkpoint: Path) -> None:
    code, _, err = run(capsys, "convert", "--fold", "model.pt", "--input", "1,3,9,9")
    assert code == 2 and "these are 4, and the model takes 1; write one as 1x3x9x9\n" in err


def test_json_is_all_that_is_printed(capsys, checkpoint: Path) -> None:
    for command in (
        ["convert", "--fold", "model.pt", "--dry-run"],
        ["convert", "--fold", "model.pt", "-o", "o.pt", "--onnx", "o.onnx", "--input", "1x3x9x9"],
        ["compare", "model.pt", "model.pt"],
        ["inspect", "model.pt"],
    ):
        code, out, err = run(capsys, *command, "--json")
        found = json.loads(out)
        assert (code, err) == (0, "") and found["provenance"]["rewrite"] == rewrite.__version__


def test_a_report_of_compare_says_where_it_comes_from(capsys, checkpoint: Path) -> None:
    assert run(capsys, "compare", "model.pt", "model.pt", "--report", "r.json")[0] == 0
    found = json.loads(Path("r.json").read_text())
    assert found["provenance"]["model.pt"].startswith("sha256 ") and len(found["after"]) == 5


def test_an_own_page_may_be_replaced_and_no_other(capsys, checkpoint: Path) -> None:
    command = ["compare", "model.pt", "model.pt", "--html", "page.html"]
    assert [run(capsys, *command)[0] for _ in range(2)] == [0, 0]
    Path("page.html").write_text("<!doctype html><p>somebody's own")
    assert run(capsys, *command)[0] == 2
    assert Path("page.html").read_text().endswith("somebody's own")


@pytest.mark.parametrize("place", [".", ".."])
def test_a_folder_by_its_short_name_is_no_traceback(capsys, tmp_path, monkeypatch, place) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    code, _, err = run(capsys, "convert", "--fold", place)
    assert code == 2 and "config.json" in err and err.count("\n") == 1


def test_a_low_agreement_says_what_to_do(capsys, checkpoint: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)]
    torch.manual_seed(1)
    rewrite.save(randomize_norms_(nn.Sequential(*layers)).eval(), "net.pt")
    swap = ["convert", "--bn-to-in", "--keep", "nothing", "net.pt", "-o", "o.pt", "--force"]
    torch.save(torch.randn(64, 3, 9, 9), "own.pt")
    shown = run(capsys, *swap, "--input", "own.pt")[1]
    assert "of 64 (" in shown and "agreement is low: --keep function" in shown
    kept = run(capsys, "convert", "--fold", "net.pt", "-o", "o.pt", "--force", "--input", "own.pt")
    assert "same top-1 as the original: 64 of 64\n" in kept[1] and "is low" not in kept[1]
