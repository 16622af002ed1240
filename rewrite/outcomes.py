"""What a pass promises and what becomes of a candidate: contracts, sites, changes, skips."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

from rewrite.errors import OptionError

if TYPE_CHECKING:
    from torch.fx import Node


Choice = TypeVar("Choice", bound=enum.StrEnum)


def as_choice(kind: type[Choice], value: str, option: str) -> Choice:
    """Return the member of `kind` that `value` is or spells.

    Raises:
        OptionError: it is none; the message names `option` and every member.
    """
    try:
        return kind(value)
    except ValueError:
        raise OptionError(f"{option} is {value!r}; pass {', '.join(kind)}") from None


class Contract(enum.StrEnum):
    """What a rewrite promises; verification holds it to this."""

    EXACT = "exact"
    """Equal for every input, in train and in eval mode."""
    EXACT_IN_EVAL = "exact-in-eval"
    """Equal for every input in eval mode."""
    APPROXIMATE = "approximate"
    """Another function, close to the old one: the agreement is measured and reported."""
    REDEFINING = "redefining"
    """Another function by intent: only structure is checked."""

    @classmethod
    def weakest(cls, contracts: Iterable[Contract]) -> Contract:
        """Return what holds where all of these have to: the last of them, `EXACT` for none."""
        return max(contracts, key=list(cls).index, default=cls.EXACT)


@dataclass(frozen=True)
class Site:
    """A place that a pass will rewrite.

    `target` is the qualified name that reports show, `before` what stands there in a few words,
    `node` the call in the graph (None for a site that is no call), `plan` whatever `find` decided.
    """

    target: str
    before: str
    node: Node | None = None
    plan: Any = None


@dataclass(frozen=True)
class Change:
    """A site that was rewritten: what stood there, what stands there now, what else was touched.

    `touched` names every module whose parameters, buffers or class changed, `target` included, and
    single tensors that came or went.
    `keys` maps old state-dict keys to new ones (None: the key is gone). `metrics` are numbers a
    pass measured at this site. `recipe` is what it takes to repeat the change on the state dict of
    another checkpoint (`rewrite.fold.recipes`), as plain data; `shapes` are those of the tensors
    that it names, to which another checkpoint is held.
    """

    target: str
    before: str
    after: str
    note: str = ""
    touched: tuple[str, ...] = ()
    keys: Mapping[str, str | None] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass declined, and why."""

    target: str
    before: str
    reason: str


@dataclass(frozen=True)
class Declined:
    """Why something is not done, and the nodes that stand in its way: an answer, never an error."""

    reason: str
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Selection:
    """Which sites are wanted.

    Attributes:
        only, skip: shell patterns on qualified names; `skip` wins.
        left_out: qualified names of sites that are left out, each with the reason.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, only: str | Iterable[str], skip: str | Iterable[str]) -> Selection:
        """Return the sites that patterns choose; one pattern may be given as it is."""
        one, other = ((p,) if isinstance(p, str) else tuple(p) for p in (only, skip))
        return cls(one, other)

    def refusal(self, target: str) -> str | None:
        """Return why `target` is not wanted, or None if it is."""
        if self.only and not any(fnmatchcase(target, pattern) for pattern in self.only):
            return f"not matched by --only {' '.join(self.only)}"
        for pattern in self.skip:
            if fnmatchcase(target, pattern):
                return f"matched by --skip {pattern}"
        return self.left_out.get(target)
