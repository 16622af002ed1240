"""Read the JSON of a report, as `rewrite convert --report` writes it; nothing in it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewrite.errors import CheckpointError, one_line, system_reason
from rewrite.files import no_file

_LARGEST = 256 << 20
"""Bytes of the longest report that is read."""


def read_report(path: Path) -> Mapping[str, Any]:
    """Return what the JSON file of a report says.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    if wrong := no_file(path):
        raise CheckpointError(f"{path}: {wrong}")
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path}: is too long for a report")
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {system_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no report can be read: {one_line(error)}") from error
    if not isinstance(report, dict) or not isinstance(report.get("passes"), list):
        raise CheckpointError(f"{path}: is no report: it lists no passes")
    return report
