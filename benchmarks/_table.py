"""What every benchmark prints: a Markdown table, and its place in docs/benchmarks.md.

A benchmark is a module with a `main` that ends in

    publish("convert-time", "Time of one conversion", table(header, rows), write=args.write)

which prints the section, and with `--write` puts it between its markers in docs/benchmarks.md
(at the end of the page when it is new). Nobody edits these sections by hand.
"""

import argparse
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
RESCALING = PAGE.with_name("rescaling.md")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows `--write`; a benchmark adds options of its own."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--write",
        action="store_true",
        help="replace this benchmark's section in docs/benchmarks.md",
    )
    return arguments


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format rows as a Markdown table: the first column is left-aligned, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def environment(*packages: str) -> str:
    """Say in one line what the numbers were measured on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}, load average {os.getloadavg()[0]:.0f}"
    )


def publish(name: str, title: str, body: str, *, write: bool, page: Path = PAGE) -> None:
    """Print the section `name`, and replace it in a page of docs/ when asked to."""
    command = " ".join(["python -m", _module(), *(a for a in sys.argv[1:] if a != "--write")])
    section = f"## {title}\n\n`{command}`\n\n{body.strip()}\n"
    print(section)
    if write:
        write_section(page, name, section)


def write_section(page: Path, name: str, section: str) -> None:
    """Put a section between its markers in a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_section(text, name, section), encoding="utf-8")


def replace_section(page: str, name: str, section: str) -> str:
    """Return `page` with the text between the markers of `name` replaced, or appended."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{section.strip()}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if pattern.search(page):
        return pattern.sub(lambda _: block, page)
    return f"{page.rstrip()}\n\n{block}\n"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem
