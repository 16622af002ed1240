"""The kernel of a sum of parallel linear branches, as one sum over shifted windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.affine.algebra import Affine, dirac, embed, offset
from rewrite.graph.captured import Captured
from rewrite.graph.operators import Conv


@dataclass(frozen=True, eq=False)
class Term:
    """One branch: `affine` after the convolution `conv`, or after nothing.

    `links` says of which tensors `affine` is made, first to last (`rewrite.fold.recipes`).
    """

    conv: Conv | None
    affine: Affine
    links: tuple[Mapping[str, Any], ...] = ()


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


@dataclass(frozen=True)
class NoMerge:
    """Why branches that look parallel are not merged."""

    root: Node
    owner: str
    reason: str


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


def merged_kernel(captured: Captured, merge: Merge) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one convolution, in float64."""
    outer = merge.outer
    old = captured.tensor(outer.weight)
    taps = tuple(old.shape[2:])
    kernel = torch.zeros(old.shape, dtype=torch.float64, device=old.device)
    bias = torch.zeros(old.shape[0], dtype=torch.float64, device=old.device)
    column = (-1, *(1,) * (old.dim() - 1))
    for term in merge.terms:
        affine = term.affine.to(old.device)
        at = place_of(captured, term, outer)
        conv_bias = torch.zeros_like(bias)
        if term.conv is None:
            part = dirac(old.shape[0], outer.groups, taps, at).to(old.device)
        else:
            part = embed(captured.tensor(term.conv.weight).detach().double(), taps, at)
            if term.conv.bias is not None:
                conv_bias = captured.tensor(term.conv.bias).detach().double()
        kernel += affine.scale.view(column) * part
        bias += affine.scale * conv_bias + affine.shift
    return kernel, bias
