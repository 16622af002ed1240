"""Put pages that live outside of docs/ into the site, and let links between both sides hold.

In the repository a page of docs/ refers to `../CONTRIBUTING.md`, and that one to `docs/folding.md`.
In the site both lie in one folder.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and the examples as they are."""
    for name in (*PAGES, *(f"examples/{path.name}" for path in ROOT.glob("examples/*.py"))):
        if (ROOT / name).exists():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links between the two sides lead to where the pages lie in the site."""
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\((?:\.\./)?docs/", "](" + "../" * page.file.src_uri.count("/"), markdown)
    depth = page.file.src_uri.count("/")
    outside = "../" * (depth + 1)
    return re.sub(rf"\]\({re.escape(outside)}(?!\.\.)", "](" + "../" * depth, markdown)
