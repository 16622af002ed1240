"""The state of a training: saved and loaded, so that a resumed run equals an uninterrupted one.

accelerate saves optimizer, schedule, model and random generators. This module holds the rest: the
step, the curves, the best state, and the states of the loss and of the recentering.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rewrite.checkpoint.pickles.unpickle import DAMAGED, load_pickle
from rewrite.checkpoint.vetting.vet import vet_pickle, vet_safetensors
from rewrite.errors import CheckpointError, OptionError, RewriteError, one_line, system_reason
from rewrite.files import removed_if_killed
from rewrite.runtime.leaves import leaves
from rewrite.swap.anchor import Recentering
from rewrite.training.recovered import Held


@dataclass
class LoopState:
    """The state of the training loop, except for optimizer and model.

    Attributes:
        student: the model that is trained, not wrapped.
        target: the loss on labels, with its statistics; None without labels.
        recentering: the schedule that anneals the anchors away; None keeps them.
        plan: must be equal in a saved state and in the training that resumes it.
        prints: digests, by name, of what must be equal too; they are saved with the plan.
        step: number of steps done.
        steps, agreements: the curves so far.
        best: the best state on the held-out samples, with the eps of each norm.
        stale: number of evaluations since the best one.
    """

    student: nn.Module
    target: nn.Module | None
    recentering: Recentering | None
    plan: dict[str, Any]
    prints: dict[str, str]
    step: int = 0
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    agreements: list[tuple[int, Held]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0

    def note(self, held: Held) -> None:
        """Record an evaluation, and the present state if it is the best so far."""
        self.agreements.append((self.step, held))
        if not self.best or held.score > tuple(self.best["score"]):
            self.keep(held)
        else:
            self.stale += 1

    def keep(self, held: Held) -> None:
        """Store the present state as the best one."""
        tensors = {k: v.detach().cpu().clone() for k, v in self.student.state_dict().items()
                   if isinstance(v, Tensor)}  # fmt: skip
        eps = {name: module.eps for name, module in self.student.named_modules()
               if isinstance(getattr(module, "eps", None), float)}  # fmt: skip
        self.best = {"score": list(held.score), "state": tensors, "eps": eps, "step": self.step}
        self.stale = 0

    def restore_best(self) -> None:
        """Load the best state into the student."""
        self.student.load_state_dict(self.best["state"])
        for name, module in self.student.named_modules():
            if name in self.best["eps"]:
                module.eps = self.best["eps"][name]

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain data and tensors."""
        return {
            "plan": {**self.plan, **self.prints},
            "step": self.step,
            "steps": [list(row) for row in self.steps],
            "agreements": [[step, vars(held)] for step, held in self.agreements],
            "best": self.best,
            "stale": self.stale,
            "target": {} if self.target is None else self.target.state_dict(),
            "recentered": 0 if self.recentering is None else self.recentering.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            CheckpointError: its best state does not fit this student.
            OptionError: it belongs to a training with another plan or of another model or data.
        """
        was = state["plan"]
        for key, value in self.plan.items():
            if was.get(key) != value:
                raise OptionError(
                    f"the saved state is of {key} {was.get(key)}, this training of {value}"
                )
        for key, value in self.prints.items():
            if was.get(key) != value:
                raise OptionError(f"the saved state is of another {key}; pass a new folder")
        best, own = state["best"]["state"], self.student.state_dict()
        if {k: v.shape for k, v in best.items()} != {
            k: v.shape for k, v in own.items() if isinstance(v, Tensor)
        }:
            raise CheckpointError("the best state in it is none of this student")
        self.step, self.stale, self.best = state["step"], state["stale"], state["best"]
        self.steps = [(int(s), float(loss), float(rate)) for s, loss, rate in state["steps"]]
        self.agreements = [(int(step), Held(**held)) for step, held in state["agreements"]]
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        if self.recentering is not None:
            self.recentering.resume(state["recentered"])


def fingerprint(value: Any) -> str:
    """Return a digest of the names, shapes, dtypes and bytes of all tensors in `value`."""
    digest = hashlib.sha256()
    for name, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{name} {tuple(leaf.shape)} {leaf.dtype}".encode())
            raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def save_state(accelerator: Any, folder: Path, own: Sequence[Any]) -> None:
    """Save a training into `folder`, completely or not at all.

    Args:
        accelerator: saves model, optimizer and random generators.
        folder: replaced if it exists.
        own: objects with the rest of the state; each has a `state_dict` of plain data and tensors.

    Raises:
        CheckpointError: it cannot be written; what was there stays.
    """
    part, old = _part(folder), _old(folder)
    try:
        if accelerator.is_main_process:
            finish_state(folder)
        accelerator.wait_for_everyone()
        with removed_if_killed(part) if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.save_state(str(part))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for number, keeper in enumerate(own):
                    torch.save(keeper.state_dict(), part / _OWN.format(number))
                if folder.exists():
                    folder.rename(old)
                part.rename(folder)
                finish_state(folder)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        with contextlib.suppress(CheckpointError):
            finish_state(folder)
        raise CheckpointError(
            f"{folder}: the state cannot be written: {one_line(error)}"
        ) from error


def has_state(accelerator: Any, folder: Path) -> bool:
    """Return whether there is a state to go on from, put back where a run was cut off.

    Raises:
        CheckpointError: the system refuses.
    """
    if accelerator.is_main_process:
        finish_state(folder)
    accelerator.wait_for_everyone()
    with _refusals(folder):
        return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def finish_state(folder: Path) -> None:
    """Put back the state of a run that was cut off while it replaced it; take away what is left.

    Raises:
        CheckpointError: the system refuses.
    """
    with _refusals(folder):
        if _old(folder).exists() and not folder.exists():
            _old(folder).rename(folder)
        for left in (_part(folder), _old(folder)):
            if left.exists():
                shutil.rmtree(left)


@contextlib.contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Raise CheckpointError where the system refuses."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: {system_reason(error)}") from error


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def load_state(accelerator: Any, folder: Path, own: Sequence[Any]) -> None:
    """Restore what `save_state` wrote; all files are vetted before accelerate opens any.

    Files of `own` are opened by this project's restricted reader, not unpickled by accelerate.

    Raises:
        CheckpointError: a file may not be opened, is damaged or missing, or the system refuses.
        OptionError: the state belongs to a training with another plan or of another model or data.
    """
    with _refusals(folder):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is no folder of a training")
        files = sorted(folder.iterdir())
    for file in files:
        (vet_safetensors if file.suffix == ".safetensors" else vet_pickle)(file)
    try:
        for number, part in enumerate(own):
            part.load_state_dict(load_pickle(folder / _OWN.format(number)))
        accelerator.load_state(str(folder))
    except RewriteError as error:
        text = str(error)
        raise type(error)(text if text.startswith(f"{folder}") else f"{folder}: {text}") from error
    except (*DAMAGED, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: no training can go on from it: {one_line(error)}"
        ) from error


_OWN = "loop_{}.pt"
"""What the files of a state are called that are not accelerate's."""


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Record Ctrl-C instead of raising it, so that a step is completed.

    Yields:
        A list that is empty until SIGINT arrives. A second SIGINT raises KeyboardInterrupt.
    """
    met: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield met
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: Any) -> None:
        met.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield met
    finally:
        signal.signal(signal.SIGINT, before)
