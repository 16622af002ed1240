"""The index of the documentation leads to every page."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page != "index.md" and page not in index] == []


def test_each_picture_is_small_and_stands_beside_its_command() -> None:
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    pictures = [re.findall(r"!\[[^]]+\]\(([^)]+)\)", section) for section in sections]
    assert sum(map(len, pictures)) >= 8
    for section, names in zip(sections, pictures, strict=True):
        assert names and "`python -m benchmarks." in section
        assert [name for name in names if (DOCS / name).stat().st_size > 150_000] == []
