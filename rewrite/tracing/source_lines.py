"""Find the line of the model's own code that is running or that raised an error."""

from __future__ import annotations

import random
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch

from rewrite.provenance import shown_path

_HERE = Path(__file__).parent

_MACHINERY = tuple(f"{p}/" for p in (Path(torch.__file__).parent, _HERE, _HERE.parent / "graph"))

_STANDARD = f"{Path(random.__file__).parent}/"

_TRACERS = (f"{_HERE}/", f"{Path(torch.__file__).parent / 'fx'}/")

_LAYERS = f"{Path(torch.__file__).parent / 'nn'}/"


def reason_of(error: BaseException) -> tuple[str, str | None]:
    """Return the first sentence of `error`, and the line of the model's code that raised it."""
    text = str(error).strip().splitlines()
    first = text[0].split(". ")[0] if text else ""
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_MACHINERY)
    ]
    source = f"{shown_path(frames[-1].filename)}:{frames[-1].lineno}" if frames else None
    return reason, source


def user_frame(start: FrameType | None = None) -> FrameType | None:
    """Return the innermost frame, from `start` on, that runs the model's own code."""
    frame: FrameType | None = start or sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return frame


def runs_in_torch() -> bool:
    """Return whether the running code is that of torch.nn.

    Its branches choose between implementations of one function, such as the fast path of attention.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_TRACERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_LAYERS)


def asked_by_model(frame: FrameType) -> bool:
    """Return whether a frame runs the model's own code, not torch, the tracer or Python itself."""
    file = frame.f_code.co_filename
    installed = "site-packages" in file or "dist-packages" in file
    standard = file.startswith((_STANDARD, "<frozen")) and not installed
    return not standard and not file.startswith(_MACHINERY)


def short(source: str | None) -> str:
    """Return " at file.py:123" for a line of code, "" for none."""
    return "" if source is None else f" at {Path(source).name}"
