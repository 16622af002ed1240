"""ONNX: export a model, verify a graph that anyone made.

Inside the package `onnx` is always the library: imports are absolute.
"""

from __future__ import annotations

__all__ = ["Check", "OnnxVerification", "check_exportable", "export", "verify_onnx"]
