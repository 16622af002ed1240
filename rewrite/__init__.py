"""Rewrite trained PyTorch models: swap, fold, reparameterize; prove it; export it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewrite.capture import Captured, capture
    from rewrite.checkpoint import load, save
    from rewrite.errors import (
        CaptureError,
        CheckpointError,
        ExportError,
        OptionError,
        PassError,
        RewriteError,
        VerificationError,
    )
    from rewrite.onnx import export, verify_onnx
    from rewrite.pipeline import Result, convert
    from rewrite.protocol import Change, Contract, Pass, Site, Skip
    from rewrite.report import Report
    from rewrite.signals import Signal, signal
    from rewrite.verify import Verification, verify

# Each public name and the module that holds it: importing `rewrite` alone imports no torch.
_HOMES = {
    "Captured": "capture",
    "capture": "capture",
    "load": "checkpoint",
    "save": "checkpoint",
    "CaptureError": "errors",
    "CheckpointError": "errors",
    "ExportError": "errors",
    "OptionError": "errors",
    "PassError": "errors",
    "RewriteError": "errors",
    "VerificationError": "errors",
    "export": "onnx",
    "verify_onnx": "onnx",
    "Result": "pipeline",
    "convert": "pipeline",
    "Change": "protocol",
    "Contract": "protocol",
    "Pass": "protocol",
    "Site": "protocol",
    "Skip": "protocol",
    "Report": "report",
    "Signal": "signals",
    "signal": "signals",
    "Verification": "verify",
    "verify": "verify",
}

__all__ = [
    "CaptureError",
    "Captured",
    "Change",
    "CheckpointError",
    "Contract",
    "ExportError",
    "OptionError",
    "Pass",
    "PassError",
    "Report",
    "Result",
    "RewriteError",
    "Signal",
    "Site",
    "Skip",
    "Verification",
    "VerificationError",
    "capture",
    "convert",
    "export",
    "load",
    "save",
    "signal",
    "verify",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rewrite' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rewrite.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `rewrite.verify` the function when the module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*globals(), *__all__]
