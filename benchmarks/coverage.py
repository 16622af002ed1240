"""The coverage sweep."""

from benchmarks.corpus import QUICK, UnbuildableError, build

__all__ = ["QUICK", "UnbuildableError", "build"]
