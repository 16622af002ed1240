"""The architecture page names every file of the packages by its docstring's first sentence.

`python tests/test_architecture.py` writes the lists of the page anew.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files -->\n", "<!-- end of files -->\n"

PACKAGES = (
    "",
    *sorted(
        path.parent.relative_to(ROOT / "rewrite").as_posix()
        for path in (ROOT / "rewrite").glob("*/**/__init__.py")
    ),
)


def first_sentence(path: Path) -> str:
    """Return the first paragraph of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("|", "\\|")


def lists() -> str:
    """Return a heading and a table for each package, and for the passes."""
    parts = []
    for folder in (*(ROOT / "rewrite" / name for name in PACKAGES), ROOT / "passes"):
        name = folder.relative_to(ROOT).as_posix()
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        rows = [
            f"| `{path.relative_to(ROOT).as_posix()}` | {first_sentence(path)} |" for path in files
        ]
        parts.append(
            f"### `{name}/`\n\n{first_sentence(folder / '__init__.py')}.\n\n"
            + "\n".join(["| file | one idea |", "|---|---|", *rows])
            + "\n"
        )
    return "\n".join(parts)


def test_the_page_names_every_file() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == lists().strip(), "run: python tests/test_architecture.py"


def test_no_package_has_more_than_sixteen_files() -> None:
    for name in PACKAGES:
        files = [p.name for p in (ROOT / "rewrite" / name).glob("*.py") if "__" not in p.name]
        assert len(files) <= 16, (name, sorted(files))


ELSEWHERE = {
    "affine": "rules of a propagation show in whole folds: tests/fold, passes/test_fold*.py",
    "cli": "export is tried with bad and good graphs: cli/test_bad_graphs.py, onnx/test_export.py",
    "html": "pages are read as a reader sees them: html/test_page.py, html/test_browser.py",
    "hub": "a folder that is loaded is one that was converted: sharded/test_convert.py",
    "observe": "exports and labels show in what folds: observe/test_outcomes.py, test_flow.py",
    "sharded": "a plan shows in the folder that it makes: sharded/test_convert.py, test_recipes.py",
    "signals": "a row is a field of a report: signals/test_measure.py",
    "streams": "classes and layers are parts of the values: streams/test_values.py, test_groups.py",
    "swap": "what three swaps share: passes/test_bn_to_gn.py, test_bn_to_in.py, test_bn_to_ln.py",
}
"""Packages some of whose files have no test of their name, and what tests those instead."""

MOST_ELSEWHERE = 14
"""How many files have no test of their name: the number may only fall."""


def _without_test(folder: str) -> list[str]:
    """Return the files of a package that have no test of their name."""
    files = (ROOT / "rewrite" / folder).glob("*.py")
    names = sorted(p.name for p in files if not p.name.startswith("__"))
    return [name for name in names if not (ROOT / "tests" / folder / f"test_{name}").exists()]


def test_tests_mirror_the_packages() -> None:
    rest = {folder: files for folder in PACKAGES if (files := _without_test(folder))}
    for folder, files in rest.items():
        assert folder in ELSEWHERE, (
            f"rewrite/{folder}: {files} have no tests/{folder}/test_<file>.py"
        )
    assert set(ELSEWHERE) <= set(rest), "a package that is mirrored needs no reason"
    count = sum(map(len, rest.values()))
    assert count <= MOST_ELSEWHERE, f"{count} files have no test of their name: {rest}"


def _lines(node: ast.ClassDef | ast.FunctionDef) -> int:
    """Return how many lines a definition has, those of a function without its docstring."""
    begin = node.lineno
    if isinstance(node, ast.FunctionDef):
        begin = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0].lineno
    assert node.end_lineno is not None
    return node.end_lineno - begin + 1


def test_files_classes_and_functions_fit() -> None:
    long = []
    for path in [*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py")]:
        text = path.read_text(encoding="utf-8")
        if (count := len(text.splitlines())) > 400:
            long.append(f"{path.name}: {count} lines, 400 at most")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                most = 200 if isinstance(node, ast.ClassDef) else 60
                if (count := _lines(node)) > most:
                    long.append(f"{path.name}: {node.name} has {count} lines, {most} at most")
    assert not long, "\n".join(long)


def test_every_ignored_type_has_a_reason() -> None:
    bare = []
    for path in [*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(r"# type: ignore(\[[\w, -]+\])?\s*$", line):
                bare.append(f"{path.name}:{number}")
    assert not bare, f"say in a comment behind it why the type is ignored: {bare}"


def test_every_docstring_begins_with_one_sentence() -> None:
    for path in [*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py")]:
        assert re.match(r"[`A-Z\w]", first_sentence(path)), path


def test_docstrings_and_pages_name_modules_that_exist() -> None:
    import rewrite

    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in ROOT.glob("rewrite/**/*.py")
    }
    public = {f"rewrite.{name}" for name in dir(rewrite)} | {"rewrite.passes"}
    known = modules | public
    texts = [*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py"), *ROOT.glob("docs/**/*.md")]
    for path in (*texts, ROOT / "README.md"):
        for name in re.findall(r"`(rewrite(?:\.\w+)+)", path.read_text(encoding="utf-8")):
            assert name in known or name.rpartition(".")[0] in known - {"rewrite"}, (path, name)


if __name__ == "__main__":
    whole = PAGE.read_text(encoding="utf-8")
    before, after = whole[: whole.index(BEGIN) + len(BEGIN)], whole[whole.index(END) :]
    PAGE.write_text(f"{before}\n{lists()}\n{after}", encoding="utf-8")
