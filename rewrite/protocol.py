"""What a pass is: find sites in a captured model, then rewrite them one by one.

    find : Captured -> (Site | Skip)*        reads, decides, changes nothing
    rewrite : Captured, Site -> Change       edits one site, in place, through the editor

`apply_pass` is the only caller of both. A declined candidate is a `Skip` with its reason, never an
exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch.nn.parameter import is_lazy

from rewrite.errors import OptionError, PassError, RewriteError
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.memory import rare_collection
from rewrite.outcomes import Change, Contract, Selection, Site, Skip
from rewrite.runtime.tree import Tree, join
from rewrite.text.some import some

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.fx import GraphModule
    from torch.fx.passes.infra.pass_base import PassResult

    from rewrite.graph.model_code import OtherEntry
    from rewrite.runtime.inputs import ExampleCall


@dataclass(frozen=True)
class Applied:
    """What one application of a pass did.

    `model` is the rewritten model: the one that was given, unless its root itself was replaced.
    `exact` is what written tensors are before they are rounded, in float64, by qualified name; it
    is empty unless it was asked for.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...] = ()
    exact: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


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
    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Rewrite one site in place, through `captured.editor`, and say what changed."""

    def rewrite_all(
        self, captured: Editable, sites: Sequence[Site], calibration: Iterable[Any] | None = None
    ) -> list[Change]:
        """Rewrite all sites and return one change each, in their order.

        A pass that fits every site in one run over the data, or makes a tensor of what several
        sites contribute, overrides this; the others rewrite one site after the other.

        Args:
            captured: the model that `find` has read.
            sites: the sites that are wanted, in the order in which `find` yielded them.
            calibration: batches of the user's data, if there are any.

        Raises:
            PassError: a site cannot be rewritten; `target` names it.
        """
        changes = []
        for site in sites:
            try:
                change = self.rewrite(captured, site)
            except RewriteError:
                raise
            except Exception as error:
                message = f"{self.name}: {site.target}: {error}"
                raise PassError(message, site.target) from error
            if not isinstance(change, Change):
                kind = type(change).__name__
                raise PassError(
                    f"{self.name}: {site.target}: rewrite returns a {kind}; return a Change",
                    site.target,
                )
            changes.append(change)
        return changes

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Apply to a GraphModule in place, as torch.fx's pass managers expect."""
        from torch.fx.passes.infra.pass_base import PassResult

        applied = apply_pass(self, graph_module)
        return PassResult(graph_module, bool(applied.changes))


def find_sites(
    pass_: Pass, captured: Captured, selection: Selection | None = None
) -> tuple[list[Site], list[Skip]]:
    """Return what a pass would do and what it declines; `selection` declines more.

    Raises:
        PassError: `find` itself failed; the cause is chained.
    """
    selection = selection or Selection()
    sites: list[Site] = []
    skips: list[Skip] = []
    evidence = captured.evidence if isinstance(captured, Editable) else captured
    for outcome in _found(pass_, evidence):
        if isinstance(outcome, Skip):
            skips.append(outcome)
        elif (reason := selection.refusal(outcome.target)) is not None:
            skips.append(Skip(outcome.target, outcome.before, reason))
        else:
            sites.append(outcome)
    return sites, skips


def _found(pass_: Pass, evidence: Captured) -> list[Site | Skip]:
    try:
        found = list(pass_.find(evidence))
    except RewriteError:
        raise
    except Exception as error:
        hint = "; find changes nothing: edit in rewrite" if "'editor'" in str(error) else ""
        raise PassError(f"{pass_.name}: find failed: {error}{hint}") from error
    for outcome in found:
        if not isinstance(outcome, Site | Skip):
            kind = type(outcome).__name__
            raise PassError(f"{pass_.name}: find yields a {kind}; yield a Site or a Skip")
    return found


@rare_collection()
def apply_pass(
    pass_: Pass,
    model: nn.Module,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    selection: Selection | None = None,
    calls: Sequence[ExampleCall] = (),
    numbers: Callable[[str], Tensor] | None = None,
    *,
    keep_exact: bool = False,
) -> Applied:
    """Apply one pass to `model` in place and return its changes and skips.

    Args:
        pass_: the pass.
        model: any module; it is edited in place.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords.
        calibration: batches for passes that fit to data.
        selection: which sites are wanted; all of them without one.
        calls: calls that may be observed, where a forward cannot be traced.
        numbers: what a tensor on the meta device holds, by its name: a model without values.
        keep_exact: keep what verification asks for: what written tensors are before they are
            rounded. The old tensors stay in memory for it.

    Raises:
        PassError: the pass itself failed; the cause is chained.
    """
    captured = capture(model, example_inputs, calls)
    captured.numbers = numbers
    captured.exact = {} if keep_exact else None
    sites, skips = find_sites(pass_, captured, selection)
    shapes = _shapes(model) if sites else {}
    entries = captured.code.other_entries
    modules = frozenset(captured.tree.names)
    try:
        changes = pass_.rewrite_all(captured, sites, calibration) if sites else []
        captured.editor.commit()
    except RewriteError:
        raise
    except Exception as error:
        raise PassError(f"{pass_.name}: {error}") from error
    done = tuple(
        replace(change, touched=_touched(captured, change), shapes=_shapes_read(change, shapes))
        for change in _with_forwards(captured, changes)
    )
    touched = frozenset(name for change in done for name in change.touched)
    notes = (
        *captured.notes,
        *_kept_settings(captured),
        *_other_entries(entries, touched, modules, captured.model),
    )
    return Applied(captured.model, done, tuple(skips), notes, captured.exact or {})


def _kept_settings(captured: Editable) -> Iterable[str]:
    """Yield which attributes an edited forward does not read any more, in words."""
    for (kind, held), owners in captured.editor.settings.items():
        place = owners[0] or "the model"
        more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
        shown = some(held, _SHOWN)
        yield (
            f"the forward of {place} ({kind}){more} was edited and keeps {shown}: setting them "
            "afterwards changes nothing"
        )


_SHOWN = 4
"""So many attributes are named in one note."""


def _other_entries(
    entries: Sequence[OtherEntry], touched: Set[str], modules: Set[str], model: nn.Module
) -> Iterable[str]:
    """Yield the methods beside `forward` that read a module of `touched`, in words.

    `modules`: the names that there were before the edit; some of them may be gone.
    """
    read = [entry for entry in entries if entry.reads & touched]
    left = Tree(model).names if read else {}
    for entry in read:
        what = sorted(entry.reads & touched)
        if gone := [name for name in what if name in modules and name not in left]:
            yield f"{entry.method} reads {', '.join(gone)}, which is gone: it no longer runs"
        else:
            changed = ", ".join(what)
            yield f"{entry.method} reads {changed}, which changed: what it returns differs"


def _with_forwards(captured: Editable, changes: Sequence[Change]) -> list[Change]:
    """Return the changes with the tensors that came or went with an edited forward among them.

    They belong to the changes that name the tensor or its owner, else to those inside of the owner.
    """
    changes = list(changes)
    if not captured.editor.rewritten:
        return changes
    model = captured.model
    live = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    live |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for owner, tensors in captured.editor.rewritten.items():
        for tensor in tensors:
            named = [{c.target, *c.touched, *c.keys} for c in changes]
            at = [i for i, names in enumerate(named) if tensor in names or owner in names]
            at = at or [
                i for i, names in enumerate(named) if any(n.startswith(f"{owner}.") for n in names)
            ]
            for index in at or range(len(changes)):
                change = changes[index]
                keys = change.keys if tensor in live else {tensor: None, **change.keys}
                touched = (*change.touched, tensor)
                changes[index] = replace(change, touched=touched, keys=keys)
    return [_without_live_keys(change, live) for change in changes]


def _without_live_keys(change: Change, live: Set[str]) -> Change:
    """Return `change` without the keys that it calls gone although something else reads them."""
    kept = {old: new for old, new in change.keys.items() if new is not None or old not in live}
    return replace(change, keys=kept)


def _touched(captured: Captured, change: Change) -> tuple[str, ...]:
    """Return what a change touched, its target and every alias among it."""
    touched = dict.fromkeys((change.target, *change.touched))
    for name in list(touched):
        owner, _, attr = name.rpartition(".")
        if name in captured.tree.names:
            touched.update(dict.fromkeys(captured.aliases(name)))
        elif owner in captured.tree.names:
            touched.update(dict.fromkeys(join(alias, attr) for alias in captured.aliases(owner)))
    return tuple(touched)


def _shapes(model: nn.Module) -> dict[str, dict[str, torch.Size]]:
    """Return the shape of every tensor of floating point by its name, under its module's name."""
    found: dict[str, dict[str, torch.Size]] = {}
    pending = [("", model)]
    while pending:
        prefix, module = pending.pop()
        held = {
            f"{prefix}{key}": tensor.shape
            for tensors in (module._parameters, module._buffers)
            for key, tensor in tensors.items()
            if tensor is not None and tensor.is_floating_point() and not is_lazy(tensor)
        }
        if held:
            found[prefix[:-1]] = held
        for key, child in module._modules.items():
            if child is not None:
                pending.append((f"{prefix}{key}.", child))
    return found


def _shapes_read(
    change: Change, shapes: Mapping[str, Mapping[str, torch.Size]]
) -> dict[str, list[int]]:
    """Return the shapes of what the recipe of a change names: tensors, and those of modules."""
    named: set[str] = set()
    _collect_strings(change.recipe, named)
    read: dict[str, list[int]] = {}
    for part in sorted(named):
        owner = part.rpartition(".")[0]
        if part and part in shapes:
            read |= {name: list(shape) for name, shape in shapes[part].items()}
        elif (shape := shapes.get(owner, {}).get(part)) is not None:
            read[part] = list(shape)
    return read


def _collect_strings(data: Any, found: set[str]) -> None:
    """Add every text in plain data to `found`."""
    if isinstance(data, str):
        found.add(data)
        return
    parts = data.values() if isinstance(data, Mapping) else data
    if isinstance(parts, Iterable):
        for part in parts:
            if type(part) is str:
                found.add(part)
            elif not isinstance(part, int | float | None):
                _collect_strings(part, found)
