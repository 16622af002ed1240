"""The classes of layers that architectures are made of, watched while they are built and run.

    python -m benchmarks.seen_classes --write        all architectures of the corpus, resumable
    python -m benchmarks.seen_classes timm:resnet18 transformers:vit

Each architecture is built twice and run once, on meta tensors, which takes no memory. The second
time every event that Python's audit hooks report is counted for the layer in whose method it came:

    a file is opened, a connection made, a process started, text compiled or evaluated

Imports are left out, and so is what no method of a layer is on the stack of. What is seen is kept
as data (`seen_classes.json`): each class with the first architecture that showed it, whether a call
of it ran, and what it did. `allowed_classes` reads sources; a test holds its list to this one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from benchmarks._table import parser
from benchmarks.allowed_classes import PLACES
from benchmarks.corpus import UnbuildableError, construct, fit_inputs, names

DATA = Path(__file__).with_suffix(".json")

EVENTS = (
    "open", "exec", "compile", "os.", "socket.", "subprocess.", "urllib.", "ftplib.", "http.",
    "shutil.", "ctypes.", "pickle.", "marshal.",
)  # fmt: skip
"""The beginnings of events that a listed layer may not cause."""


class Watch:
    """Counts what the methods of layers do, by the class of the layer."""

    def __init__(self) -> None:
        self.did: dict[str, set[str]] = {}
        self._on = False
        sys.addaudithook(self._heard)  # it stays for the life of the process

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count what happens inside."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _heard(self, event: str, _: Any) -> None:
        if not self._on or not event.startswith(EVENTS):
            return
        self._on = False
        try:
            layer = _innermost_layer(sys._getframe(1))
            if layer is not None:
                self.did.setdefault(full_name(layer), set()).add(event)
        finally:
            self._on = True


def _innermost_layer(frame: FrameType | None) -> type | None:
    """Return the class of the layer whose method caused an event, None for an import."""
    found: type | None = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return None
        owner = frame.f_locals.get("self")
        if found is None and isinstance(owner, nn.Module):
            found = type(owner)
        frame = frame.f_back
    return found


def full_name(kind: type) -> str:
    """Return the module and the name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def seen_in(name: str, watch: Watch) -> tuple[set[str], set[str]]:
    """Return the listed packages' classes in one architecture, and those of them that ran.

    Raises:
        UnbuildableError: it cannot be built.
    """
    construct(name, "meta")  # what it imports is imported now
    with watch.on():
        model = construct(name, "meta")
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.add(full_name(type(module))))
        for module in model.modules()
    ]
    # What takes none of the usual inputs runs as far as it comes.
    with watch.on(), torch.device("meta"), contextlib.suppress(UnbuildableError):
        fit_inputs(name, model)
    for hook in hooks:
        hook.remove()
    packages = tuple(f"{package}." for package in PLACES)
    built = {full_name(type(module)) for module in model.modules()}
    return {full for full in built if full.startswith(packages)}, ran


def main() -> None:
    """Build, run and watch architectures; keep what was seen."""
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="PACKAGE:ARCHITECTURE")
    options.add_argument("--every", type=int, default=1, help="each n-th name")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    classes, tried = data.get("classes", {}), set(data.get("tried", []))
    every = [n for p in ("torchvision", "timm", "transformers") for n in names(p)]
    watch = Watch()
    for name in chosen.names or [n for n in every[:: chosen.every] if n not in tried]:
        watch.did.clear()
        tried.add(name)
        try:
            built, ran = seen_in(name, watch)
        except UnbuildableError as error:
            print(f"{name}: {error}"[:120], flush=True)
            continue
        for full in sorted(built):
            entry = classes.setdefault(full, {"in": name, "ran": False, "did": []})
            entry["ran"] |= full in ran
            entry["did"] = sorted({*entry["did"], *watch.did.get(full, ())})
        if chosen.write:
            DATA.write_text(text(classes, tried))
    print(summary(classes, tried))


def summary(classes: dict[str, Any], tried: set[str]) -> str:
    """Return in one line what was seen."""
    ran = sum(entry["ran"] for entry in classes.values())
    did = [full for full, entry in classes.items() if entry["did"]]
    return f"{len(tried)} architectures, {len(classes)} classes built, {ran} run, {len(did)} acted"


def text(classes: dict[str, Any], tried: set[str]) -> str:
    """Return JSON with one class a line."""
    lines = (f"{json.dumps(full)}: {json.dumps(classes[full])}" for full in sorted(classes))
    joined = ",\n".join(lines)
    return f'{{\n"tried": {json.dumps(sorted(tried))},\n"classes": {{\n{joined}\n}}\n}}\n'


if __name__ == "__main__":
    main()
