"""One-line errors that say what was meant, and a project's defaults."""

from pathlib import Path

import pytest

from tests.cli.running import run


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


def test_nothing_is_suggested_for_what_is_like_nothing(capsys) -> None:
    assert "did you mean" not in run(capsys, "xyzzy")[2]


def test_a_project_has_defaults_that_the_command_line_overrides(capsys, model_here: Path) -> None:
    config = model_here.with_name("pyproject.toml")
    config.write_text('[tool.rewrite.verify]\ninput = "1x4x9x9"\n')
    code, _, said = run(capsys, "verify", "model.pt", "model.pt")
    assert code == 2 and "1x4x9x9" in said
    assert run(capsys, "verify", "model.pt", "model.pt", "--input", "1x3x9x9")[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.rewrite.verfy]\nquick = true", "is no command; did you mean verify?"),
        ("[tool.rewrite.verify]\nquik = true", "did you mean quick?"),
        ("[tool.rewrite.verify]\nquick = 3", "quick = 3 does not fit --quick; write true or false"),
        ('[tool.rewrite]\nseed = "x"', 'seed = "x" does not fit --seed; write a number'),
        ("[tool.rewrite]\nseed = true", "seed = true does not fit --seed; write a number"),
        ('[tool.rewrite.verify]\nexpect-no = "Add"', 'write a list of texts, ["..."]'),
        ('[tool.rewrite.verify]\ncontract = "same"', 'write "exact" or "exact-in-eval" or '),
        ("[tool.rewrite.verify]\ninput = 5", 'input = 5 does not fit --input; write a text, "..."'),
        ("[tool.rewrite]\nverify = 3", "verify is a command; write [tool.rewrite.verify]"),
        ("[tool.rewrite", "cannot be read"),
        ('[tool.rewrite]\ntrust = ["evil"]', "what code runs"),
        ('[tool.rewrite.verify]\nfactory = "evil:build"', "what code runs"),
        ('[tool.rewrite.convert]\ncalibration = "evil:data"', "what code runs"),
        ("[tool.rewrite.convert]\nforce = true", "what is replaced"),
        ('[tool.rewrite.convert]\nrecover = "evil:data"', "what code runs"),
        ("[tool]\nrewrite = 3", "tool.rewrite is no table"),
        ("[[tool.rewrite]]\nseed = 1", "tool.rewrite is no table"),
        ("x = " + "[" * 100_000, "cannot be read"),
        ('[tool.rewrite]\nreport = "../r.json"', "below the current folder alone"),
        ('[tool.rewrite.convert]\noutput = "/tmp/o.pt"', "below the current folder alone"),
        ('[tool.rewrite.verify]\nhtml = "away/r.html"', "below the current folder alone"),
        ('[tool.rewrite.export]\nreport = "hidden.json"', "below the current folder alone"),
    ],
)
def test_a_wrong_default_is_one_line(capsys, model_here: Path, text: str, said: str) -> None:
    model_here.with_name("pyproject.toml").write_text(text)
    model_here.with_name("away").symlink_to("..")
    model_here.with_name("hidden.json").symlink_to("../hidden.json")
    code, out, err = run(capsys, "verify", "model.pt", "model.pt")
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


def test_a_project_may_say_where_in_it_reports_go(capsys, model_here: Path) -> None:
    (model_here.parent / "reports").mkdir()
    config = model_here.with_name("pyproject.toml")
    config.write_text('[tool.rewrite.verify]\nreport = "reports/../reports/r.json"\n')
    assert run(capsys, "verify", "model.pt", "model.pt", "--quick", "--quiet")[0] == 0
    assert (model_here.parent / "reports" / "r.json").is_file()


@pytest.mark.parametrize("text", ["[tool.other]\nseed = 'x'\n", "tool = 3\n", "tool = [1]\n"])
def test_a_pyproject_without_our_table_is_left_alone(capsys, model_here: Path, text: str) -> None:
    model_here.with_name("pyproject.toml").write_text(text)
    assert run(capsys, "verify", "model.pt", "model.pt", "--quick", "--quiet")[0] == 0


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
        (["inspect", "--html", "a.html", "m.pt"], "; it is a flag of rewrite convert, verify, "),
        (["--fold", "m.pt"], "; did you mean rewrite convert --fold m.pt?\n"),
        (["inspect", "--outptu", "a", "m.pt"], "--outptu m.pt; rewrite inspect --help"),
    ],
)  # fmt: skip
def test_a_wrong_usage_is_one_line_that_leads_on(capsys, arguments, said) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
