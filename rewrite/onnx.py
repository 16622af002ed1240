"""ONNX: export a model, verify a graph that anyone made.

Inside the package `onnx` is always the library: imports are absolute.
"""

from __future__ import annotations

from rewrite.onnx_export import check_exportable, export
from rewrite.onnx_report import Check, OnnxVerification
from rewrite.onnx_verify import verify_onnx

__all__ = ["Check", "OnnxVerification", "check_exportable", "export", "verify_onnx"]
