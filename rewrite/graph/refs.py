"""References into a captured model: a tensor by module and attribute, and readers of a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class TensorRef:
    """A parameter, buffer or attribute: which module holds it, by qualified name, and its key."""

    owner: str
    attr: str

    @classmethod
    def of(cls, name: str) -> TensorRef:
        """Return the reference of a tensor by its qualified name."""
        owner, _, attr = name.rpartition(".")
        return cls(owner, attr)

    @property
    def name(self) -> str:
        """The qualified name, as in a state dict."""
        return f"{self.owner}.{self.attr}" if self.owner else self.attr


@dataclass(frozen=True)
class Readers:
    """Who reads a value. `known` is False when code that was not traced may read it too."""

    nodes: tuple[Node, ...]
    known: bool
    reason: str = ""
