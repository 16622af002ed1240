"""The index of the documentation leads to every page."""

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_index_names_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page != "index.md" and page not in index] == []
