"""What a command refuses of the files that it would read and write, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import refused, run


def test_a_page_takes_no_other_files_place(capsys, model_here: Path) -> None:
    before = model_here.read_bytes()
    code, _, err = run(capsys, "verify", "model.pt", "model.pt", "--html", "model.pt")
    assert code == 2 and "--html model.pt: is model.pt" in err and model_here.read_bytes() == before


@pytest.mark.parametrize("command", ["convert --fold -o there.pt", "inspect", "verify model.pt"])
def test_a_mistyped_file_is_said_before_anything_else(
    capsys, model_here: Path, command: str
) -> None:
    Path("there.pt").touch()
    code, _, err = run(capsys, *command.split(), "modle.pt")
    assert (code, err) == (2, "rewrite: modle.pt: no such file; did you mean model.pt?\n")


@pytest.mark.parametrize(
    "command", ["convert --fold --onnx out.pt model.pt", "export model.pt out.pt"]
)
def test_a_graph_has_the_name_of_one(capsys, model_here: Path, command: str) -> None:
    code, _, err = run(capsys, *command.split())
    assert code == 2 and "out.pt: a graph is a .onnx file" in err and not Path("out.pt").exists()


SAME = {
    "the report": ("--report", "out.pt"),
    "spelled otherwise": ("--report", "./x/../out.pt"),
    "the page": ("--html", "out.pt"),
    "the graph": ("--onnx", "out.pt"),
    "both reports": ("--report", "a.json", "--html", "a.json"),
}


@pytest.mark.parametrize("name", SAME)
def test_two_files_of_a_command_are_never_one(
    checkpoint, capsys, tmp_path, monkeypatch, name
) -> None:
    """The second would take the place of the first, without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    before = sorted(tmp_path.rglob("*"))
    base = ("convert", "--fold", checkpoint, "--input", "1x3x9x9")
    code, _, err = run(capsys, *base, "-o", "out.pt", *SAME[name])
    assert code == 2
    assert "give each file a place of its own" in err
    assert sorted(tmp_path.rglob("*")) == before
    code, _, err = run(capsys, *base, "-o", "out.pt", "--report", "out.json", "--html", "out.html")
    assert code == 0, err


def test_a_report_may_not_be_the_default_output(checkpoint, capsys) -> None:
    place = Path(checkpoint).with_suffix(".rewritten.pt")
    code, _, err = run(capsys, "convert", "--fold", checkpoint, "--report", place)
    assert (code, "is what --output names as well" in err) == (2, True)


FOLD = ("convert", "--fold", "model.pt", "--force", "--input", "1x3x9x9")

TAKEN = {
    "no output": ("--output: is empty", *FOLD, "-o", ""),
    "no report": ("--report: is empty", *FOLD, "--report", ""),
    "no page": ("--html: is empty", *FOLD, "--html", ""),
    "a folder as a report": ("--report new/: names a folder", *FOLD, "--report", "new/"),
    "a folder as an output": ("--output new/: names a folder", *FOLD, "-o", "new/"),
    "the terminal": ("is a pipe or a device", *FOLD, "--report", "/dev/stdout"),
    "a graph of no text": ("name is text in UTF-8", "export", "model.pt", "x\udcff.onnx"),
    "a zero": ("is no path of a file", *FOLD, "-o", "a\0b"),
    "a long name": ("file name too long", *FOLD, "--report", "n" * 256),
    "the input": ("x.npy, which is read", *FOLD, "--input", "x.npy", "-o", "x.npy"),
    "a picture": ("is in photos, which is read", "convert", "--bn-to-gn", "model.pt", "--force",
                  "--calibration", "photos", "--report", "photos/a.png"),
    "weights beside the graph": ("the graph (for weights beside it) names as well", "export",
                                 "model.pt", "o.onnx", "--report", "o.onnx.data"),
    "weights of a graph": ("holds the weights of g.onnx", "verify", "g.onnx", "--report",
                           "g.onnx.data", "--force"),
    "the report that is applied": ("map.json, which is read", "apply-map", "map.json", "model.pt",
                                   "map.json", "--force"),
    "the teacher": ("other.pt, which is read", "recover", "model.pt", "--teacher", "other.pt",
                    "--data", "x.npy", "-o", "other.pt", "--force"),
    "the folder of a repro": ("--repro names as well", "verify", "g.onnx", "model.pt", "--repro",
                              "out", "--report", "out"),
    "a journal": ("a list of unfinished work", *FOLD, "-o", ".rewrite-committed"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_a_command_takes_nobodys_place(
    capsys: pytest.CaptureFixture[str], model_here: Path, name: str
) -> None:
    here = model_here.parent
    (here / "photos").mkdir()
    for file in ("other.pt", "x.npy", "g.onnx", "g.onnx.data", "map.json", "photos/a.png"):
        (here / file).write_bytes(model_here.read_bytes())
    refused(capsys, *TAKEN[name])


def test_a_model_may_be_replaced_by_what_became_of_it(
    capsys: pytest.CaptureFixture[str], model_here: Path
) -> None:
    before = model_here.read_bytes()
    assert run(capsys, *FOLD, "-o", "model.pt")[0] == 0
    assert model_here.read_bytes() != before


def test_names_that_are_no_text_are_written(
    capsys: pytest.CaptureFixture[str], model_here: Path
) -> None:
    name = "x\udcff\n\x1b[2J"
    written = [f"{name}.pt", f"{name}.json", f"{name}.html"]
    flags = zip(("-o", "--report", "--html"), written, strict=True)
    code, out, err = run(capsys, *FOLD, *(part for pair in flags for part in pair))
    assert code == 0, err
    assert set(written) <= {path.name for path in model_here.parent.iterdir()}
    assert "\x1b" not in out and r"wrote x\udcff" in out


LONG = "n" * 300

NO_PATHS = [
    ("no such file", "inspect", LONG),
    ("no such file", "inspect", f"{LONG}.pt"),
    ("no such file", "inspect", "model.pt/x"),
    ("no such file", "compare", LONG, LONG),
    ("no such file", "export", LONG, "o.onnx"),
    ("no such file", "verify", "model.pt/x.onnx"),
    ("no such folder or file", "convert", "--bn-to-gn", "model.pt", "--calibration", LONG),
    ("file name too long", "inspect", "model.pt", "--input", f"{LONG}.npz"),
    ("file name too long", "verify", f"{LONG}.onnx"),
    ("file name too long", "convert", "--fold", LONG),
    ("file name too long", "export", "model.pt", f"{LONG}.onnx"),
    ("file name too long", "recover", LONG, "--teacher", LONG, "--data", LONG),
    ("file name too long", "apply-map", LONG, LONG, LONG),
]


@pytest.mark.usefixtures("model_here")
@pytest.mark.parametrize(("words", "arguments"), [(words, rest) for words, *rest in NO_PATHS])
def test_what_can_be_no_path_is_one_line(
    capsys: pytest.CaptureFixture[str], words: str, arguments: list[str]
) -> None:
    refused(capsys, words, *arguments)
