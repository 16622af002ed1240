"""What a conversion of a folder will read and write, decided on its structure alone.

    passes on the model on meta -> recipes -> every tensor that they read or write, in the index
                                -> the configuration under which the class holds the result

Nothing is written before all of this is known. A class of the folder is loaded by its
configuration, so a norm keeps a weight (of ones) where the class says so, and a tensor may appear
or go only where the configuration can say so. A site whose result no class can hold is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rewrite import registry
from rewrite.errors import CheckpointError, OptionError
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.safetensors_file import type_name
from rewrite.hub.structure import Structure
from rewrite.observe.calls import known_calls
from rewrite.observe.stream_recipe import StreamRecipe
from rewrite.outcomes import Contract, Selection
from rewrite.protocol import Pass
from rewrite.report import PassReport, Report
from rewrite.runtime.inputs import ExampleCall
from rewrite.sharded.configuration import Holding, Wanted, attainable, find_holding, present
from rewrite.sharded.dry_run import ShapeStore, Touched, adds_bias
from rewrite.sharded.on_meta import apply_on_meta, recipes_of
from rewrite.sharded.recipes import FolderRecipe, Step, in_folder, recipe_of, steps_of, unmet
from rewrite.sharded.values import FolderValues
from rewrite.weights.constant_recipe import ConstantRecipe


@dataclass(frozen=True)
class Made:
    """A tensor that a conversion writes: its type in the format's words, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FolderPlan:
    """Everything that is known before the first byte is written.

    Attributes:
        structure: the model on meta, as the folder has it.
        steps: what is run, in order.
        made: the tensors that are written, by their name in the new folder.
        passing: those that a step writes and a later one takes away, by that name.
        gone: the tensors of the old folder that the new one has not.
        config: the new configuration.
        report: what the passes did and what they left alone.
        contract: the weakest of the passes that changed something.
    """

    structure: Structure
    steps: Sequence[Step]
    made: Mapping[str, Made]
    passing: Mapping[str, Made]
    gone: frozenset[str]
    config: Mapping[str, Any]
    report: Report
    contract: Contract

    def place(self, name: str) -> str:
        """Return the name in the new folder of a tensor of the model."""
        return name if name in self.made else self.structure.stored_name(name)

    def made_of(self, name: str) -> Made:
        """Return type and shape of a tensor of the model that a step writes."""
        place = self.place(name)
        return self.made[place] if place in self.made else self.passing[place]


def plan_folder(
    folder: CheckpointFolder,
    structure: Structure,
    passes: Pass | type[Pass] | str | Sequence[Pass | type[Pass] | str],
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
) -> FolderPlan:
    """Decide everything; read no tensor but those whose values a pass asks for.

    Raises:
        OptionError: a pass whose changes cannot be run tensor by tensor, or none of whose changes
            the class of the folder can hold.
        CheckpointError: a tensor that is read or written is not in the folder as it has to be.
    """
    chosen = registry.as_passes(passes)
    calls = known_calls(structure.model, None, None)
    selections = [Selection.of(only, skip) for _ in chosen]
    while True:
        draft = _Draft(folder, structure, calls)
        wrong: dict[tuple[int, str], str] = {}
        for number, pass_ in enumerate(chosen):
            wrong = draft.add(number, pass_, selections[number])
            if wrong:
                break
        holding = None
        if not wrong:
            holding = draft.holding()
            wrong = draft.broken(holding)
        if holding is not None and not wrong:
            return draft.finished(holding, chosen)
        if not wrong:
            kind = type(structure.model).__name__
            raise CheckpointError(f"{folder.path}: no configuration of {kind} holds the result")
        for (number, target), reason in wrong.items():
            old = selections[number]
            selections[number] = replace(old, left_out={**old.left_out, target: reason})
        _check_something_is_left(folder, draft, wrong)


def _check_something_is_left(
    folder: CheckpointFolder, draft: _Draft, wrong: Mapping[tuple[int, str], str]
) -> None:
    """Raise OptionError where the class of a folder can hold no change of a stream at all."""
    sites = [(number, change.target) for number, change, _ in draft.sites]
    streams = [site for site, (_, _, r) in zip(sites, draft.sites, strict=True)
               if isinstance(r, StreamRecipe)]  # fmt: skip
    if streams and set(sites) == wrong.keys() and all("asks for" in r for r in wrong.values()):
        target, reason = next(iter(wrong.items()))
        raise OptionError(f"{folder.path}: {target[1]}: {reason}")


class _Draft:
    """The steps of the passes so far, and what they touch.

    Args:
        folder: the old folder.
        structure: its model on meta, which is not changed.
        calls: those that may be observed.
    """

    def __init__(
        self, folder: CheckpointFolder, structure: Structure, calls: Sequence[ExampleCall]
    ) -> None:
        self.sites: list[tuple[int, Any, FolderRecipe]] = []
        self._folder, self._structure, self._calls = folder, structure, calls
        self._model: nn.Module = structure.model
        self._store = ShapeStore(folder, structure)
        self._steps: list[Step] = []
        self._touched: list[Touched] = []
        self._owners: list[list[tuple[int, str]]] = []
        self._reports: list[PassReport] = []
        self._notes: list[str] = [] if calls else [_uncalled(structure.model)]

    def _values(self) -> FolderValues:
        """Return the values of tensors as they are after the steps so far."""
        written = tuple(touched.written for touched in self._touched)
        return FolderValues(self._folder, self._structure, tuple(self._steps), written)

    def add(self, number: int, pass_: Pass, selection: Selection) -> dict[tuple[int, str], str]:
        """Plan one pass more; return the sites that cannot stay, with the reason."""
        applied, report = apply_on_meta(pass_, self._model, selection, self._calls, self._values())
        recipes = recipes_of(applied)
        self._notes += [note for note in applied.notes if note not in self._notes]
        self._reports.append(report)
        for places in steps_of(recipes):
            step = tuple(recipes[place] for place in places)
            owners = [(number, applied.changes[place].target) for place in places]
            if (name := unmet(step, self._values())) is not None:
                return dict.fromkeys(owners, f"{name} is not what the norm needs: fold it first")
            values = self._values()
            self._steps.append(step)
            self._touched.append(self._store.run(step, values))
            self._owners.append(owners)
        self.sites += [(number, c, r) for c, r in zip(applied.changes, recipes, strict=True)]
        self._model = applied.model
        return {}

    def holding(self) -> Holding | None:
        """Return the configuration under which the class holds the result, None without one."""
        return find_holding(self._folder, self._structure, self._wanted())

    def _wanted(self) -> Wanted:
        gone = self._gone()
        names = present(self._structure) | self._store.held.keys()
        left = frozenset(name for name in names if self._store.place(name) not in self._store.gone)
        return Wanted(left - gone, self._appeared(), gone, frozenset(self._exchanged()))

    def _gone(self) -> frozenset[str]:
        gone = {name for touched in self._touched for name in touched.gone}
        return frozenset(n for n in gone if self._store.place(n) in self._store.gone)

    def _appeared(self) -> frozenset[str]:
        appeared = {name for touched in self._touched for name in touched.appeared}
        return frozenset(name for name in appeared if name in self._store.held)

    def _exchanged(self) -> dict[str, tuple[int, str]]:
        """Return the norms that have to become RMSNorms, and the site that says so."""
        found: dict[str, tuple[int, str]] = {}
        for number, change, recipe in self.sites:
            if isinstance(recipe, StreamRecipe) and recipe.map["kind"] == "centre":
                found |= dict.fromkeys(recipe.norms, (number, change.target))
        return found

    def broken(self, holding: Holding | None) -> dict[tuple[int, str], str]:
        """Return the sites whose result the class cannot hold, with the reason."""
        if holding is not None:
            return self._shifted(holding)
        kind = type(self._structure.model).__name__
        exchanged = self._exchanged()
        if exchanged:
            reason = f"no configuration of {kind} asks for RMSNorms, so no folder can hold it"
            return dict.fromkeys(exchanged.values(), reason)
        wrong: dict[tuple[int, str], str] = {}
        left = attainable(self._folder, self._structure, self._wanted())
        for touched, owners, step in zip(self._touched, self._owners, self._steps, strict=True):
            if touched.appeared and touched.appeared <= left and not touched.gone:
                continue
            new = sorted(touched.appeared - self._structure.stored.keys())
            if any(map(adds_bias, step)):
                reason = "a bias would appear that its class cannot be asked for"
            elif new:
                reason = f"{new[0]} would appear, which no configuration of {kind} holds"
            elif touched.appeared:
                own = min(touched.appeared)
                reason = f"{own} would be its own, which no configuration of {kind} holds alone"
            elif touched.gone:
                name = min(touched.gone)
                reason = f"{name} would go, and every configuration of {kind} holds it"
            else:
                continue
            wrong |= dict.fromkeys(owners, reason)
        return wrong

    def _shifted(self, holding: Holding) -> dict[tuple[int, str], str]:
        """Return the sites that would lose a bias which is not zero."""
        wrong = {}
        exchanged, values = self._exchanged(), self._values()
        for name in sorted(holding.rms):
            bias = f"{name}.bias"
            if self._folder.holds(self._store.place(bias)) and bool(values(bias).any()):
                reason = f"{bias} is not zero, and RMSNorms of its class have none: fold it first"
                wrong[exchanged[name]] = reason
        return wrong

    def _add_zeros(self, holding: Holding) -> None:
        """Plan the biases of zeros that the class asks for beside those that appear."""
        for name, shape in holding.zeros.items():
            like = f"{name.rpartition('.')[0]}.weight"
            step = (ConstantRecipe(name, 0.0, shape, like),)
            values = self._values()
            self._steps.append(step)
            self._touched.append(self._store.run(step, values))
        if holding.zeros:
            first, count = min(holding.zeros), len(holding.zeros)
            self._notes.append(
                f"{count} biases of zeros, as {first}, appear beside: the class has all or none"
            )

    def finished(self, holding: Holding, chosen: Sequence[Pass]) -> FolderPlan:
        """Return the plan."""
        dropped = {self._store.place(f"{name}.bias") for name in holding.rms}
        self._add_zeros(holding)
        every = {name: _made(tensor) for name, tensor in self._store.ever.items()}
        kept = self._store.held.keys() - dropped
        made = {name: held for name, held in every.items() if name in kept}
        passing = {name: held for name, held in every.items() if name not in kept}
        gone = {n for n in self._store.gone | dropped if self._folder.holds(n)} - made.keys()
        biases = [f"{name}.bias" for name in holding.rms]
        lost = {name for name in biases if self._folder.holds(self._store.place(name))}
        reports = [_with_lost(report, lost) for report in self._reports]
        numbers = {number for number, _, _ in self.sites}
        contract = Contract.weakest(p.contract for n, p in enumerate(chosen) if n in numbers)
        return FolderPlan(
            self._structure, tuple(self._steps), made, passing, frozenset(gone), holding.config,
            Report(tuple(reports), tuple(self._notes)), contract,
        )  # fmt: skip


def _with_lost(report: PassReport, lost: Collection[str]) -> PassReport:
    """Return a report as the folder has it: what norms keep, and what centred streams lose."""
    changes = []
    for change in map(in_folder, report.changes):
        recipe = recipe_of(change)
        if isinstance(recipe, StreamRecipe) and recipe.map["kind"] == "centre":
            keys = {name: new for name, new in change.keys.items() if new is not None}
            biases = [f"{name}.bias" for name in recipe.norms]
            gone = dict.fromkeys([name for name in biases if name in lost])
            change = replace(change, keys={**keys, **gone})
        changes.append(change)
    return replace(report, changes=tuple(changes))


def _uncalled(model: nn.Module) -> str:
    kind = type(model).__name__
    return (
        f"no call of {kind} runs without its numbers, so none was observed; rewrite.load opens the "
        "folder, and convert runs it in memory"
    )


def _made(tensor: Tensor) -> Made:
    return Made(type_name(tensor.dtype), tuple(tensor.shape))
