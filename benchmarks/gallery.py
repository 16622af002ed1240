"""Draw the pictures of docs/gallery.md that no other benchmark draws, into docs/images/.

    python -m benchmarks.gallery

The report's two need a headless Chromium; the others matplotlib. Everything is seeded.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
import rewrite
from benchmarks._browser import headless, opened
from benchmarks._table import parser
from rewrite.equivalence.side_by_side import of_runs
from rewrite.html.pages import verification_page
from rewrite.rescaling.balance_report import balance_report

IMAGES = Path(__file__).parent.parent / "docs" / "images"

COLORS = 64
"""Of a screenshot: text and flat areas need no more, and the file is a third."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all of them and print their sizes."""
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=IMAGES)
    folder = options.parse_args(arguments).folder
    for path in (*report(folder), *signals(folder), *balance(folder)):
        print(f"{path.stat().st_size / 1e3:4.0f} kB  {path}")


def report(folder: Path) -> list[Path]:
    """Draw the page of a verification with one planted error, light and dark."""
    import torchvision

    torch.manual_seed(0)
    model = models.randomize_norms_(torchvision.models.resnet18()).eval()
    x = torch.randn(1, 3, 64, 64)
    wrong: Any = copy.deepcopy(rewrite.convert(model, "fold", example_inputs=x, verify=False).model)
    with torch.no_grad():
        wrong.layer2[0].conv1.weight[3] *= 1.5
    found = rewrite.verify(model, wrong, x, level="quick")
    runs, place = found.runs, found.divergence
    assert runs is not None and place is not None
    place = replace(place, source=_short(place.source), source_after=_short(place.source_after))
    found = replace(found, divergence=place)
    title = "resnet18.folded.pt held to resnet18.pt"
    page = verification_page(found, of_runs(model, wrong, runs), {}, title).render()
    paths = [folder / "report_light.png", folder / "report_dark.png"]
    with tempfile.TemporaryDirectory() as scratch, headless() as browser:
        file = Path(scratch) / "page.html"
        file.write_text(page, encoding="utf-8")
        for path, scheme in zip(paths, ("light", "dark"), strict=True):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            opened(browser, file)
            _write_png(browser.get_screenshot_as_png(), path)
    return paths


def _short(line: str | None) -> str | None:
    """Return a line of code by its package, wherever that is installed."""
    return None if line is None else line.rpartition("site-packages/")[2]


def _write_png(content: bytes, path: Path) -> None:
    from PIL import Image

    few = Image.open(io.BytesIO(content)).convert("RGB").quantize(COLORS)
    few.save(path, optimize=True)


def signals(folder: Path) -> list[Path]:
    """Draw how a signal dies in a deep ReLU network, and lives after `--reinit he`."""
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    x = torch.randn(64, 64)
    drawn = rewrite.convert(model, "reinit{scheme=he}", example_inputs=x).model
    path = folder / "signal.png"
    rewrite.signal(drawn, x).plot(path, before=rewrite.signal(model, x))
    _write_png(path.read_bytes(), path)
    return [path]


def balance(folder: Path) -> list[Path]:
    """Draw how far the two sides of each channel are apart, before and after `l2`."""
    model: Any = rewrite.load("models.digits_resnet:load_digits_resnet")
    x = torch.rand(2, 1, 8, 8)
    passes = ["fold", "rebalance{objective=l2}"]
    folded = rewrite.convert(model, passes[:1], example_inputs=x).model
    equal = rewrite.convert(model, passes, example_inputs=x).model
    paths = []
    for name, each in (("before", folded), ("after", equal)):
        path = folder / f"balance_{name}.png"
        balance_report(each, (x,)).plot(path)
        _write_png(path.read_bytes(), path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    main()
