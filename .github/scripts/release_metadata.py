"""Write what only the place of a release knows into a checkout, before its distributions are built.

A package index shows README.md alone, so its links have to be absolute there, and the address of
the project stands in no file: a fork releases under its own. The workflow `release` runs this in a
checkout that is thrown away; GitHub's variables say where it is, and at which tag.
"""

import os
import re
from pathlib import Path

_LINK = re.compile(r"(!?\[[^]]*\]\()(?!\w+:|#)([^)\s]+\))")
_PAGES = {
    "Repository": "",
    "Documentation": "blob/{tag}/docs/index.md",
    "Changelog": "blob/{tag}/CHANGELOG.md",
    "Issues": "issues",
}


def absolute(text: str, repository: str, tag: str) -> str:
    """Return a page whose links to files beside it lead into the repository at a tag."""

    def target(found: re.Match[str]) -> str:
        kind = "raw" if found[1].startswith("!") else "blob"
        return f"{found[1]}{repository}/{kind}/{tag}/{found[2]}"

    return _LINK.sub(target, text)


def with_urls(pyproject: str, repository: str, tag: str) -> str:
    """Return the text of a `pyproject.toml` with the addresses of the project."""
    urls = [
        f'{name} = "{"/".join(filter(None, (repository, page.format(tag=tag))))}"'
        for name, page in _PAGES.items()
    ]
    head = "[project.scripts]\n"
    if pyproject.count(head) != 1:
        raise SystemExit("pyproject.toml: has not one table [project.scripts]")
    return pyproject.replace(head, "\n".join(["[project.urls]", *urls, "", head]))


def main() -> None:
    """Rewrite README.md and pyproject.toml of the current folder."""
    repository = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    tag = os.environ["GITHUB_REF_NAME"]
    for name, write in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = Path(name)
        path.write_text(write(path.read_text("utf-8"), repository, tag), encoding="utf-8")


if __name__ == "__main__":
    main()
