"""The errors of the toolkit: one root, and a child for each thing that can be at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewrite.pipeline import Result


class RewriteError(Exception):
    """The root of every error that the toolkit raises on purpose."""


class CaptureError(RewriteError):
    """A model could not be read as a graph."""


class OptionError(RewriteError):
    """An option of a pass or a command has no valid meaning."""


class CheckpointError(RewriteError):
    """A file or a MODEL reference cannot be opened, trusted or written."""


class PassError(RewriteError):
    """A pass failed while it was rewriting; names the passes that had run.

    Attributes:
        target: the qualified name of the site that it failed at, "" if that is unknown.
    """

    def __init__(self, message: str, target: str = "") -> None:
        super().__init__(message)
        self.target = target


class VerificationError(RewriteError):
    """A model could not be run for comparison, or an input does not fit it."""


class ContractError(VerificationError):
    """A rewritten model breaks the contract of a pass, also without the sites that were suspected.

    Attributes:
        result: the model that was made, with its report.
    """

    def __init__(self, message: str, result: Result[Any]) -> None:
        super().__init__(message)
        self.result = result


class ExportError(RewriteError):
    """A model cannot be exported to ONNX as it is."""


def system_reason(error: OSError) -> str:
    """Return what the system says, without its number and the path."""
    return (error.strerror or str(error)).lower()


def one_line(error: BaseException) -> str:
    """Return the first line of an error, with the next where it announces one, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
