"""The kernel of a sum of parallel linear branches, as one sum over shifted windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from rewrite.affine.algebra import Affine, offset
from rewrite.fold.links import Link
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Conv


@dataclass(frozen=True, eq=False)
class Term:
    """One branch: `affine` after the convolution `conv`, or after nothing.

    `links` says of which tensors `affine` is made, first to last.
    """

    conv: Conv | None
    affine: Affine
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, eq=False)
class Merge:
    """Branches that add up to one convolution.

    Attributes:
        root: the node whose value is y.
        source: the node whose value is x.
        inside: every node between the two, `root` included.
        owner: the module whose forward adds the last branch.
        terms: the branches.
        outer: the convolution whose window all others fit into.
    """

    root: Node
    source: Node
    inside: frozenset[Node]
    owner: str
    terms: tuple[Term, ...]
    outer: Conv

    @property
    def before(self) -> str:
        """What stands there, in a few words."""
        return f"{len(self.terms)} parallel branches"


def window(conv: Conv, outer: Conv, captured: Captured) -> tuple[int, ...] | None:
    """Return where the first tap of `conv` lies in the kernel of `outer`, or None."""
    assert not isinstance(conv.padding, str) and not isinstance(outer.padding, str)
    inner_taps = captured.tensor(conv.weight).shape[2:]
    outer_taps = captured.tensor(outer.weight).shape[2:]
    places = [
        offset((inner, pad), (outer_tap, outer_pad), dilation)
        for inner, pad, outer_tap, outer_pad, dilation in zip(
            inner_taps, conv.padding, outer_taps, outer.padding, outer.dilation, strict=True
        )
    ]
    return None if None in places else tuple(place for place in places if place is not None)


def identity_window(outer: Conv, captured: Captured) -> tuple[int, ...] | None:
    """Return the window of the 1x1 kernel that is the identity beside `outer`, None without one."""
    assert not isinstance(outer.padding, str)
    places = [
        offset((1, 0), (taps, pad), dilation)
        for taps, pad, dilation in zip(
            captured.tensor(outer.weight).shape[2:], outer.padding, outer.dilation, strict=True
        )
    ]
    return None if None in places else tuple(place for place in places if place is not None)


def place_of(captured: Captured, term: Term, outer: Conv) -> tuple[int, ...]:
    """Return where the first tap of a branch lies in the kernel of `outer`."""
    if term.conv is None:
        at = identity_window(outer, captured)
    else:
        at = window(term.conv, outer, captured)
    assert at is not None
    return at
