"""A package that a benchmark needs, and that may be missing: then one line says so."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def required(package: str) -> Any:
    """Return an imported package.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        name = "this benchmark" if spec is None else spec.name
        raise SystemExit(f"{name} needs {package}: pip install {package}") from error
