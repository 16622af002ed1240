"""`convert_checkpoint`: rewrite a folder of sharded safetensors, one tensor in memory at a time.

    open -> structure on meta -> plan -> validate all -> write beside the target -> prove -> rename

Each new tensor is computed in float64 in blocks of rows from the tensors of the old folder, rounded
once, and written at its place. The result is a folder that `from_pretrained` opens without this
toolkit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import ContractError
from rewrite.fold.executor import check_finite
from rewrite.hub.folder import CheckpointFolder, open_folder, other_weights
from rewrite.hub.safetensors_file import DTYPES
from rewrite.hub.structure import structure_of
from rewrite.pipeline import Result
from rewrite.progress import counted
from rewrite.protocol import Pass
from rewrite.report import Report
from rewrite.sharded.plan import FolderPlan, plan_folder
from rewrite.sharded.proof import Proof, prove
from rewrite.sharded.recipes import run
from rewrite.sharded.staging import check_target, staged_folder
from rewrite.sharded.streaming import scale_tensor
from rewrite.sharded.writer import FolderWriter
from rewrite.weights.tensor_recipe import ScalingOf


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    passes: Pass | type[Pass] | str | Sequence[Pass | type[Pass] | str],
    *,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Rewrite the checkpoint folder `source` into the new folder `target`; return the report.

    Neither the model nor a shard is ever in memory as a whole. The folder appears complete, or not
    at all.

    Args:
        source: a folder with `config.json` and safetensors, of a class of transformers.
        target: where the new folder goes; it may not exist.
        passes: as for `convert`; passes whose changes can be run tensor by tensor.
        only: one shell pattern on qualified names, or several; what matches none is left alone.
        skip: patterns likewise; what matches one is left alone.
        verify: whether to run both checkpoints block by block and compare.
        seed: of the input that both are run on.
        progress: called with the name of each step as it begins.

    Raises:
        CheckpointError: the folder is not whole, or cannot hold the result, or the disk refuses.
        ContractError: a block computes something else; nothing was written.
        OptionError: a pass that cannot be run tensor by tensor, or transformers is missing.
    """
    say = progress or (lambda step: None)
    place = Path(target)
    check_target(place)
    say("reading the folder")
    folder = open_folder(source)
    structure = structure_of(folder)
    folder = structure.folder
    say("planning")
    plan = plan_folder(folder, structure, passes, only, skip)
    notes = [*plan.report.notes, "planned without a tensor"]
    if files := other_weights(folder):
        notes.append(f"copied as they are, with the weights of before: {', '.join(files)}")
    if not plan.report.changes:
        return replace(plan.report, notes=tuple(notes))
    with staged_folder(place, notes) as stage:
        exact = _write(folder, plan, stage, say)
        proof = None
        if verify:
            proof = prove(folder, open_folder(stage), plan, exact, seed, say)
            notes += proof.notes
        report = _report(plan, notes, proof)
        if not report.ok:
            made = Result(structure.model, report)
            raise ContractError(f"{source}: {report.failure}; nothing was written", made)
    return report


def plan_checkpoint(
    source: str | Path,
    passes: Pass | type[Pass] | str | Sequence[Pass | type[Pass] | str],
    *,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
) -> Report:
    """Return what `convert_checkpoint` would do; nothing is read but the heads of files."""
    structure = structure_of(open_folder(source))
    return plan_folder(structure.folder, structure, passes, only, skip).report


def _write(
    folder: CheckpointFolder, plan: FolderPlan, stage: Path, say: Callable[[str], None]
) -> Exact:
    """Write the new folder into `stage`; return what each new tensor is before it is rounded."""
    exact = Exact(folder, plan)
    with FolderWriter(folder, stage, plan.made, plan.gone, plan.config) as writer:
        writer.copy_rest(say)
        for step in counted(plan.steps, say, "rewriting"):
            run(step, _FolderStore(folder, plan, writer, dict(exact)), exact)
        writer.write_rest()
    return exact


@dataclass(frozen=True)
class _FolderStore:
    """What a step reads and writes, by the names of the model.

    Attributes:
        folder, plan, writer: the old folder, what is planned, and the new folder.
        before: what earlier steps wrote, before it was rounded.
    """

    folder: CheckpointFolder
    plan: FolderPlan
    writer: FolderWriter
    before: Mapping[str, Callable[[], Tensor]]

    def get(self, name: str) -> Tensor:
        """Return a tensor as it is before the step."""
        if name in self.before:
            return self.before[name]().to(self.dtype(name))
        return self.folder.read(self.plan.structure.stored_name(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor as it is before the step."""
        if name in self.before:
            return DTYPES[self.plan.made_of(name).dtype]
        return DTYPES[self.folder.entry(self.plan.structure.stored_name(name)).dtype]

    def scale(self, source: str, names: Sequence[str], scaling: ScalingOf) -> bool:
        """Write the product of a tensor chunk by chunk, if no step has written it before.

        Raises:
            CheckpointError: the product holds values that are not finite.
        """
        place = self.plan.structure.stored_name(source)
        targets = {self.plan.place(name) for name in names} & self.plan.made.keys()
        if source in self.before or self.folder.merged.keys() & {place, *targets}:
            return False
        shard = self.folder.shards[self.folder.places[place]]
        vector = scaling(shard.entries[place].shape, torch.device("cpu"))
        writes = [partial(self.writer.write, target) for target in targets]
        scale_tensor(shard, place, writes, vector, partial(check_finite, names[0]))
        return True

    def set(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, if the new folder has it."""
        if self.plan.place(name) in self.plan.made:
            self.writer.put(self.plan.place(name), tensor)

    def delete(self, name: str) -> None:
        """Do nothing: the plan says which tensors the new folder has not."""


class Exact(dict[str, Callable[[], Tensor]]):
    """What tensors are before they are rounded, computed anew when asked: none is kept.

    A tensor that nobody has written is what the old folder holds.
    """

    def __init__(self, folder: CheckpointFolder, plan: FolderPlan) -> None:
        super().__init__()
        self._folder, self._plan = folder, plan

    def get(self, name: str, default: Any = None) -> Any:
        """Return how to compute a tensor."""
        if name in self:
            return self[name]
        stored = self._plan.structure.stored_name(name)
        return partial(self._folder.read, stored) if self._folder.holds(stored) else default

    def placed(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield the name in the new folder of each written tensor, and how to compute it."""
        for name, compute in self.items():
            if (place := self._plan.place(name)) in self._plan.made:
                yield place, compute


def _report(plan: FolderPlan, notes: Sequence[str], proof: Proof | None) -> Report:
    if len(plan.report.passes) != 1:
        parts = plan.report.passes
    else:
        found = None if proof is None else proof.verification
        parts = (replace(plan.report.passes[0], verification=found),)
    whole = None if proof is None else proof.verification
    extra = () if proof is not None else ("no block was run or compared (verify=False)",)
    return Report(parts, (*notes, *extra), whole)
