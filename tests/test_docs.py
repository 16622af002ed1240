"""The documentation does what it says: Python runs, commands print what is shown, links lead on.

The Python and console blocks of one page run from top to bottom, Python in one namespace, in an
empty folder that holds the trained digits network as `model.pt` and 200 images as `images.npz`.
What a page needs beside them stands in a comment, `<!-- setup: ... -->`, as Python. A block that
cannot run stands under `<!-- skip: reason -->`.

A console block is a line `$ rewrite ...` and what it prints, `$ echo $?` and the exit code, or
`$ cat FILE`. A line `…` stands for lines that are left out. Numbers with a point (errors, ratios,
means), seconds, hashes and the widths of columns are those of one machine and are not compared;
names, counts, percentages and words are.
`python tests/test_docs.py [PAGE...]` writes what the commands print into the pages.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rewrite.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])

BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<reason>.+) -->\n\n?)?```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"|^<!-- setup:\n(?P<setup>.*?)^-->$",
    re.M | re.S,
)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts on, and why it must not run."""

    language: str
    code: str
    line: int
    skip: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(
            match["language"] or "python",
            match["setup"] or match["code"] or "",
            text.count("\n", 0, match.start("setup" if match["setup"] else "code")) + 1,
            match["reason"],
        )
        for match in BLOCK.finditer(text)
    ]


def run_blocks(page: Path, text: str) -> dict[int, str]:
    """Run the blocks of a page; return the console blocks as they should read, by their line.

    Errors of Python point at the page's own lines.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = {}
    for block in blocks(text):
        if block.skip:
            continue
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)
        elif block.language == "console":
            found[block.line] = transcript(block.code)
    return found


def transcript(code: str) -> str:
    """Return a console block with what its commands print now."""
    lines, said = [], 0
    for command in re.findall(r"^\$ (.*(?:\\\n.*)*)", code, re.M):
        lines.append(f"$ {command}\n")
        arguments = shlex.split(command.replace("\\\n", " "), comments=True)
        if arguments == ["echo", "$?"]:
            lines.append(f"{said}\n")
        elif arguments[0] == "cat":
            lines.append(Path(arguments[1]).read_text(encoding="utf-8"))
        else:
            assert arguments[0] == "rewrite", f"no command that a page can run: {command}"
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
                try:
                    said = cli.main(arguments[1:])
                except SystemExit as left:
                    said = int(left.code or 0)
            lines.append(re.sub(r" +$", "", out.getvalue(), flags=re.M))
    return "".join(lines)


_OF_ONE_MACHINE = (
    (r"\b\d+(\.\d+)?e[-+]\d+", "#"),
    (r"\b\d+(\.\d+)? s\b", "# s"),
    (r"\b\d+\.\d+\b(?! ?%)", "#"),
    (r"\b[0-9a-f]{12,64}\b", "#"),
    (r"(?<=\S) {2,}", "  "),
)


def same(shown: str, printed: str) -> bool:
    """Say whether a console block shows what was printed, whatever depends on the machine."""
    for pattern, instead in _OF_ONE_MACHINE:
        shown, printed = (re.sub(pattern, instead, text) for text in (shown, printed))
    parts = re.split(r"^…\n", shown, flags=re.M)
    return re.fullmatch(r"(?s:.*)".join(map(re.escape, parts)), printed) is not None


@contextlib.contextmanager
def furnished(folder: Path):
    """Work in a folder that holds what the pages start from, and forget what was imported there."""
    shutil.copy(ROOT / "models" / "digits_resnet.pt", folder / "model.pt")
    with np.load(ROOT / "models" / "digits_images.npz") as images:
        np.savez(folder / "images.npz", images["arr_0"][:200])
    modules, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run_and_print_what_is_shown(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    runs = [b for b in blocks(text) if b.language in ("python", "console") and not b.skip]
    if not runs:
        pytest.skip("no block to run")
    with furnished(tmp_path):
        printed = run_blocks(page, text)
    for block in runs:
        if block.language == "console" and not same(block.code, printed[block.line]):
            assert block.code == printed[block.line], f"{page}:{block.line}"


BY_TASK = (
    "folding", "transformers", "norm_swaps", "recover", "recipes/opacus", "recipes/federated",
    "recipes/encoders", "verification", "ci", "weight_norm", "initialization", "rescaling",
    "checkpoints", "own_pass", "streams",
)  # fmt: skip


@pytest.mark.parametrize("name", BY_TASK)
def test_a_page_begins_with_a_command_and_what_it_prints(name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    shown = (b for b in blocks(text) if not text.splitlines()[b.line - 2].startswith("<!--"))
    # What makes the file or folder that the command reads may stand before it.
    first = next(b for b in shown if b.language != "python")
    lines = first.code.splitlines()
    assert first.language == "console" and not first.skip
    assert lines[0].startswith("$ rewrite ") and any(line[:2] != "$ " for line in lines)
    assert first.line < 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_imports_nothing_that_an_install_leaves_out(page):
    """A reader has the wheel and `model.pt`: `models` and `benchmarks` are in a checkout alone."""
    assert not _OF_A_CHECKOUT.search(BLOCK.sub(_without_setup, page.read_text(encoding="utf-8")))


def _without_setup(block):
    return "" if block["setup"] else block[0]


_OF_A_CHECKOUT = re.compile(r"^(?:from|import) (?:models|benchmarks|tests)\b", re.M)


def test_an_import_of_a_checkout_is_seen():
    assert _OF_A_CHECKOUT.search("```python\nfrom models.digits_resnet import CHECKPOINT\n```\n")
    assert not _OF_A_CHECKOUT.search("```python\nfrom torchvision.models import resnet18\n```\n")


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("error 6.5e-16, 3e-6 (0.9 x the noise)", "error 1e-15, 2.0e-6 (1.1 x the noise)", True),
        ("3 rewritten\n", "4 rewritten\n", False),
        ("agreement 100.0%\n", "agreement 99.8%\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\n…\nd\n", "a\nb\nc\ne\n", False),
        ("took 0.2 s\nb\n", "took 31.0 s\nb\n", True),
        ("layer1.0.bn1\n", "layer1x0.bn1\n", False),
    ],
)  # fmt: skip
def test_what_depends_on_the_machine_alone_may_differ(shown, printed, equal):
    assert same(shown, printed) is equal


def test_a_console_block_that_is_wrong_is_seen(tmp_path):
    page = "```console\n$ rewrite passes no-such-pass\n$ echo $?\n2\n```\n"
    with furnished(tmp_path):
        printed = run_blocks(Path("page.md"), page)[2]
    assert printed.endswith("$ echo $?\n2\n") and "no-such-pass" in printed.splitlines()[1]
    assert not same(blocks(page)[0].code, printed)


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every `rewrite` command in the shell blocks of a page."""
    lines = [
        line
        for block in blocks(text)
        if block.language in ("sh", "bash", "console") and not block.skip
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    found = [re.search(r"(?:^|&& |\$ |/)rewrite (.+)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_are_shown(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    with furnished(tmp_path):
        for setup in (match["setup"] for match in BLOCK.finditer(text) if match["setup"]):
            exec(compile(setup, str(page), "exec"), {"__name__": "__main__"})
        for arguments in commands(text):
            options = cli._parser(arguments).parse_args(arguments)
            if arguments[0] == "convert":
                assert options.passes.build(seed=0), arguments


def test_commands_are_found_in_every_spelling():
    text = "```console\n$ rewrite passes\n```\n```sh\nx && .venv/bin/rewrite a b # c\n```\n"
    assert commands(text) == [["passes"], ["a", "b"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_a_wrong_block_fails_at_its_own_line(tmp_path):
    page = tmp_path / "page.md"
    text = "# Title\n\n```python\nx = 1\n```\n\nand\n\n```python\ny = x + 1\nassert y == 3\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_blocks(page, text)
    assert caught.traceback[-1].lineno + 1 == 11
    assert Path(str(caught.traceback[-1].path)) == page


def test_a_marked_block_is_left_out():
    text = "<!-- skip: needs a GPU -->\n```python\nraise SystemExit\n```\n```sh\nexit 1\n```\n"
    assert [(block.language, block.skip) for block in blocks(text)] == [
        ("python", "needs a GPU"),
        ("sh", None),
    ]
    assert run_blocks(Path("page.md"), text) == {}


def update(page: Path) -> None:
    """Write what the commands of a page print into it, where it differs."""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, furnished(Path(folder)):
        printed = run_blocks(page, text)
    for block in blocks(text):
        if block.line in printed and not same(block.code, printed[block.line]):
            text = text.replace(f"\n{block.code}```", f"\n{printed[block.line]}```", 1)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in sys.argv[1:] or map(str, PAGES):
        update(Path(name).resolve())
