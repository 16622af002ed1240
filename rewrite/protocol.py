"""What a pass is: find sites in a captured model, then rewrite them one by one.

    find : Captured -> (Site | Skip)*        reads, decides, changes nothing
    rewrite : Captured, Site -> Change       edits one site, in place, through the editor

`apply_pass` is the only caller of both. A declined candidate is a `Skip` with its reason, never an
exception.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rewrite.capture import Captured, capture
from rewrite.errors import OptionError, PassError, RewriteError

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule, Node
    from torch.fx.passes.infra.pass_base import PassResult


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

    `touched` names every module whose parameters, buffers or class changed, `target` included.
    `keys` maps old state-dict keys to new ones (None: the key is gone). `metrics` are numbers a
    pass measured at this site. `recipe` is what it takes to repeat the change on the state dict of
    another checkpoint (`rewrite.keymap`), as plain data.
    """

    target: str
    before: str
    after: str
    note: str = ""
    touched: tuple[str, ...] = ()
    keys: Mapping[str, str | None] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass declined, and why."""

    target: str
    before: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Which sites the user wants, by shell patterns on qualified names; `skip` wins over `only`."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def refusal(self, target: str) -> str | None:
        """Return why `target` is not wanted, or None if it is."""
        if self.only and not any(fnmatchcase(target, pattern) for pattern in self.only):
            return f"not matched by --only {' '.join(self.only)}"
        for pattern in self.skip:
            if fnmatchcase(target, pattern):
                return f"matched by --skip {pattern}"
        return None


@dataclass(frozen=True)
class Applied:
    """What one application of a pass did.

    `model` is the rewritten model: the one that was given, unless its root itself was replaced.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite; its dataclass fields are its options.

    A subclass is a frozen dataclass with `name` (as on the command line), `contract`, and the two
    methods below. Options are checked in `__post_init__`, which raises `OptionError`.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    flag_value: ClassVar[str | None] = None
    """What the value of the command-line flag is called; None for a flag without a value."""

    @classmethod
    def from_flag(cls, values: Sequence[str]) -> Self:
        """Return the pass that `--name VALUE`, given once or several times, means."""
        raise OptionError(f"--{cls.name} takes no value ({' '.join(values)})")

    def reference(self, model: nn.Module) -> nn.Module:
        """Return what the rewritten model is compared with: `model`, unless the input changes."""
        return model

    @abstractmethod
    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every candidate in data-flow order, declined ones as `Skip`; change nothing."""

    @abstractmethod
    def rewrite(self, captured: Captured, site: Site) -> Change:
        """Rewrite one site in place, through `captured.editor`, and say what changed."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Apply to a GraphModule in place, as torch.fx's pass managers expect."""
        from torch.fx.passes.infra.pass_base import PassResult

        applied = apply_pass(self, graph_module)
        return PassResult(graph_module, bool(applied.changes))


def find_sites(
    rewrite: Pass, captured: Captured, selection: Selection | None = None
) -> tuple[list[Site], list[Skip]]:
    """Return what `rewrite` would do and what it declines; `selection` declines more."""
    selection = selection or Selection()
    sites: list[Site] = []
    skips: list[Skip] = []
    for outcome in rewrite.find(captured):
        if isinstance(outcome, Skip):
            skips.append(outcome)
        elif (reason := selection.refusal(outcome.target)) is not None:
            skips.append(Skip(outcome.target, outcome.before, reason))
        else:
            sites.append(outcome)
    return sites, skips


def apply_pass(
    rewrite: Pass,
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    calibration: Iterable[Any] | None = None,
    selection: Selection | None = None,
) -> Applied:
    """Apply one pass to `model` in place and return its changes and skips.

    A pass with a method `rewrite_all(captured, sites, calibration)` is given all sites at once:
    data-driven passes fit every site in one run over the data.

    Raises:
        PassError: the pass itself failed; the cause is chained.
    """
    captured = capture(model, example_inputs)
    sites, skips = find_sites(rewrite, captured, selection)
    together = getattr(rewrite, "rewrite_all", None)
    changes: list[Change] = []
    target = ""
    try:
        if together is not None and sites:
            changes.extend(together(captured, sites, calibration))
        else:
            for site in sites:
                target = site.target
                changes.append(rewrite.rewrite(captured, site))
        captured.editor.commit()
    except RewriteError:
        raise
    except Exception as error:
        raise PassError(f"{rewrite.name}: {target or 'commit'}: {error}") from error
    done = tuple(_complete(captured, change) for change in changes)
    return Applied(captured.model, done, tuple(skips), tuple(captured.notes))


def _complete(captured: Captured, change: Change) -> Change:
    """Return `change` with its target and every alias of what it touched among the touched."""
    touched = dict.fromkeys((change.target, *change.touched))
    for name in list(touched):
        if name in captured.tree.names:
            touched.update(dict.fromkeys(captured.aliases(name)))
    return replace(change, touched=tuple(touched))
