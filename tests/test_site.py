"""The site of the documentation: every page has its place, and a strict build has no complaint."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / ".mkdocs.yml"


def pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry
    return [page for each in inside for page in pages(each)]


def test_the_navigation_names_every_page() -> None:
    yaml = pytest.importorskip("yaml")
    text = CONFIG.read_text(encoding="utf-8").replace("!!python/name:", "")
    named = pages(yaml.safe_load(text)["nav"])
    held = [page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")]
    assert [page for page in held if page not in named] == []


def test_a_strict_build_has_no_complaint(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG)]
    ran = subprocess.run(
        [*command, "-d", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "site" / "api.html").is_file()
