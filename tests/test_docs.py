"""The documentation does what it says: Python runs, commands parse, links lead somewhere.

The Python blocks of one page run from top to bottom in one namespace, in an empty folder that holds
the trained digits network as `model.pt`. A block that cannot run stands under
`<!-- skip: reason -->`.
"""

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rewrite.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])

BLOCK = re.compile(
    r"^(?:<!-- skip: (?P<reason>.+) -->\n\n?)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
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
            match["language"],
            match["code"],
            text.count("\n", 0, match.start("code")) + 1,
            match["reason"],
        )
        for match in BLOCK.finditer(text)
    ]


def run_python(page: Path, text: str) -> int:
    """Run the Python blocks of a page and return how many; errors point at the page's own lines."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    runnable = [block for block in blocks(text) if block.language == "python" and not block.skip]
    for block in runnable:
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        exec(code, namespace)
    return len(runnable)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    if not any(block.language == "python" and not block.skip for block in blocks(text)):
        pytest.skip("no Python block to run")
    shutil.copy(ROOT / "models" / "digits_resnet.pt", tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    try:
        run_python(page, text)
    finally:
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(tmp_path):
                del sys.modules[name]


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
def test_commands_have_the_options_that_are_shown(page):
    for arguments in commands(page.read_text(encoding="utf-8")):
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
        run_python(page, text)
    assert caught.traceback[-1].lineno + 1 == 11
    assert Path(str(caught.traceback[-1].path)) == page


def test_a_marked_block_is_left_out():
    text = "<!-- skip: needs a GPU -->\n```python\nraise SystemExit\n```\n```sh\nexit 1\n```\n"
    assert [(block.language, block.skip) for block in blocks(text)] == [
        ("python", "needs a GPU"),
        ("sh", None),
    ]
    assert run_python(Path("page.md"), text) == 0
