"""What a report costs to write, to send and to open, for three large models.

    python -m benchmarks.html_report [--write]

Each model is folded with random norm statistics and verified; then its page is written and opened
in a headless Chromium, and its terminal report is printed at 80 columns. `conversion` is what
`rewrite.convert` took, verification included.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import models
import rewrite
from benchmarks._browser import headless, opened
from benchmarks._optional import required
from benchmarks._table import environment, parser, publish, table

MEGABYTES, SECONDS, SHARE, LINES = 5.0, 2.0, 0.10, 60
"""What a page may weigh, take to open, and cost beside the conversion; how long the text may be."""


def _resnet() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet152(), torch.randn(1, 3, 224, 224)


def _gpt2() -> tuple[nn.Module, Any]:
    transformers = required("transformers")

    config = transformers.GPT2Config()
    return transformers.GPT2LMHeadModel(config), torch.randint(0, config.vocab_size, (1, 64))


def _hrnet() -> tuple[nn.Module, Any]:
    import timm

    return timm.create_model("hrnet_w18"), torch.randn(1, 3, 224, 224)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "torchvision:resnet152": _resnet,
    "transformers:gpt2, 12 layers": _gpt2,
    "timm:hrnet_w18": _hrnet,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish the table."""
    options = parser(__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, headless() as browser:
        rows = [_row(name, browser, Path(folder) / "page.html") for name in MODELS]
    missed = [name for name, *_, held in rows if not held]
    body = "\n\n".join(
        (
            f"{environment('torchvision', 'timm', 'transformers')}. The limits: {MEGABYTES:.0f} MB,"
            f" {SECONDS:.0f} s to open, {SHARE:.0%} of the conversion, {LINES} lines. "
            + (f"Missed by {', '.join(missed)}." if missed else "All of them hold."),
            table(
                [
                    "model", "modules", "page, MB", "opens in, s", "conversion, s", "page, s",
                    "share", "lines",
                ],
                [cells for *cells, _ in rows],
            ),
        )
    )  # fmt: skip
    publish("html-report", "Reports", body, write=options.write)


def _row(name: str, browser: Any, path: Path) -> list[Any]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    models.randomize_norms_(model).eval()
    begin = time.perf_counter()
    result = rewrite.convert(model, "fold", example_inputs=inputs)
    converted = time.perf_counter() - begin
    begin = time.perf_counter()
    page = result.report.to_html(model, result.model, inputs)
    written = time.perf_counter() - begin
    path.write_text(page, encoding="utf-8")
    seconds = median(opened(browser, path) for _ in range(3)) / 1e3
    size, share = path.stat().st_size / 1e6, written / converted
    lines = len(terminal(result.report).splitlines())
    held = size <= MEGABYTES and seconds < SECONDS and share <= SHARE and lines <= LINES
    count = sum(1 for _ in model.modules())
    return [
        name, count, f"{size:.2f}", f"{seconds:.2f}", f"{converted:.1f}", f"{written:.2f}",
        f"{share:.1%}", lines, held,
    ]  # fmt: skip


def terminal(report: rewrite.Report, columns: int = 80) -> str:
    """Return what a terminal of so many columns shows of a report."""
    from rich.console import Console

    screen = Console(file=io.StringIO(), width=columns, highlight=False)
    with screen.capture() as printed:
        for part in report.tables():
            screen.print(part)
    return printed.get()


if __name__ == "__main__":
    main()
