"""Export models to ONNX, and verify ONNX graphs from any exporter.

Inside the package `onnx` is always the library: imports are absolute.
"""

from __future__ import annotations

__all__ = ["Check", "OnnxVerification", "check_exportable", "export", "verify_onnx"]
