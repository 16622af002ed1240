"""`recover`: train a converted model to agree with its original again.

    teacher: the original     student: the converted model     L / n over the global batch of n

A plain loop on accelerate, which provides several devices, mixed precision and resuming. The
samples of a step, and its mean loss, do not depend on the number of workers and micro-batches that
share it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.copying import copy_model
from rewrite.runtime.inputs import dtype_of
from rewrite.swap.anchor import Recentering
from rewrite.training.distillation import Objective
from rewrite.training.features import Pair, aligned, swapped_norms
from rewrite.training.held_out import HeldOut
from rewrite.training.label_smoothing import OnlineLabelSmoothing, check_labels
from rewrite.training.loop_state import (
    LoopState,
    fingerprint,
    has_state,
    interrupts,
    load_state,
    save_state,
)
from rewrite.training.options import (
    REFERENCE_BATCH,
    RecoverOptions,
    default_batch,
    default_rate,
    rate_of,
)
from rewrite.training.parameter_groups import normalized_decay, parameter_groups
from rewrite.training.recovered import Recovered
from rewrite.training.samples import Samples, read_samples, split, step_count, steps_of
from rewrite.training.schedule import warmup

Model = TypeVar("Model", bound=nn.Module)

_CLIP = 1.0


def recover(
    student: Model,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    options: RecoverOptions | None = None,
    state: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Recovered[Model]:
    """Train a copy of `student` to agree with `teacher`.

    Args:
        student: the converted model; it does not change.
        teacher: the original.
        data: batches: tensors, tuples of positional inputs, or dicts of keyword inputs; with
            `labels`, a tuple ends in labels, and a dict has the key "labels": class numbers (N,),
            or (N, *) where the output has positions, (N, K, *); int64.
        options: how to train.
        settings: the fields of `RecoverOptions` as keywords instead: `epochs`, `labels`, …
        state: a folder in which the training is saved at each evaluation and when interrupted, and
            from which it resumes.
        progress: called with one line of text at each step.

    Returns:
        The model with the best state on held-out samples, and a report of the training.

    Raises:
        OptionError: student, teacher, data and options do not fit, or accelerate is missing.
        CheckpointError: the state cannot be written.
    """
    if options is None:
        options = _options(settings)
    elif settings:
        raise OptionError("recover: pass options or their fields, not both")
    for role, given in (("student", student), ("teacher", teacher)):
        if not isinstance(given, nn.Module):
            raise OptionError(f"recover: the {role} is a {type(given).__name__}; pass a module")
    accelerator = _accelerator(options)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's own draws go on as they would have
        torch.manual_seed(options.seed)
        model = copy_model(student)
        _check_trainable(model)
        fitted, held = split(read_samples(model, data, options.labels))
        run = _Recovery(model, teacher, fitted, held, options, accelerator)
        prints = {} if state is None else _fingerprints(model, teacher, held)
        folder = None if state is None else Path(state)
        return run.run(folder, prints, progress or (lambda line: None))  # type: ignore[return-value]  # the student has the class of the argument


def _options(settings: dict[str, Any]) -> RecoverOptions:
    try:
        return RecoverOptions(**settings)
    except TypeError as error:
        raise OptionError(f"recover: {str(error).rpartition('__init__() ')[2]}") from error


def _accelerator(options: RecoverOptions) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise OptionError("recover needs accelerate; pip install accelerate") from error
    return Accelerator(mixed_precision=options.precision)


def _check_trainable(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError("the student has no trainable parameter")


class _Recovery:
    """One run of training."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        fitted: Samples,
        held: Samples,
        options: RecoverOptions,
        accelerator: Any,
    ) -> None:
        self.student, self.options, self.accelerator = student, options, accelerator
        self.fitted = fitted
        self.teacher = copy_model(teacher).eval().requires_grad_(False).to(accelerator.device)
        self.held = HeldOut.of(self.teacher, held)
        self.objective = Objective(options, self.teacher, self.held.outputs)
        self.notes: list[str] = []
        if options.labels and self.objective.classes is not None:
            self._check_labels(self.objective.classes)
        world = accelerator.num_processes
        parts = options.accumulate * world
        self.micro = options.batch_size or default_batch(len(fitted), parts)
        self.per_epoch = step_count(fitted, self.micro, options.accumulate, world)
        self.total = self.per_epoch * options.epochs
        self.batch = min(self.micro * parts, len(fitted))
        if not self.total:
            raise OptionError(f"{len(fitted)} samples for {world} workers: too few for a step")

    # -- the course ---------------------------------------------------------------------------

    def run(
        self, folder: Path | None, prints: dict[str, str], say: Callable[[str], None]
    ) -> Recovered[nn.Module]:
        """Train, and return the result with the best state; what `folder` gets holds `prints`."""
        start = time.perf_counter()
        self._prepare(prints)
        state = self.state
        if folder is not None and has_state(self.accelerator, folder):
            load_state(self.accelerator, folder, (self.state, self.schedule))
        outputs, planes = {"teacher": self.held.outputs}, {"teacher": self.held.plane(self.teacher)}
        if not state.agreements:
            held, outputs["student before"] = self.before
            planes["student before"] = self.held.plane(self.student)
            state.note(held)
        stopped = self._train(folder, say)
        state.restore_best()
        after, outputs["student after"] = self.held.measure(self.student)
        planes["student after"] = self.held.plane(self.student)
        return Recovered(
            self.student, state.agreements[0][1], after, tuple(state.steps),
            tuple(state.agreements), stopped, tuple(self.notes), self.held.calibration(outputs),
            {name: plane for name, plane in planes.items() if plane},
            time.perf_counter() - start,
        )  # fmt: skip

    def _train(self, folder: Path | None, say: Callable[[str], None]) -> str:
        """Run the remaining steps; return why they ended early, or ""."""
        state, options = self.state, self.options
        every = max(1, self.total // options.evaluations)
        began, first = time.perf_counter(), state.step
        with interrupts() as interrupted:
            for epoch in range(state.step // self.per_epoch, options.epochs):
                for size, parts in self._steps(epoch):
                    loss = self._step(size, parts)
                    if not math.isfinite(loss):
                        return (
                            f"the loss is {loss} at step {state.step + 1}: the best state is kept"
                        )
                    self._advance(loss)
                    left = (time.perf_counter() - began) / (state.step - first)
                    say(self._line(loss, left * (self.total - state.step)))
                    if state.step % every == 0 or state.step == self.total:
                        self._evaluate()
                        if folder is not None:
                            save_state(self.accelerator, folder, (self.state, self.schedule))
                        if options.patience and state.stale >= options.patience:
                            return f"no better agreement in {state.stale} evaluations"
                    elif interrupted and folder is not None:
                        save_state(self.accelerator, folder, (self.state, self.schedule))
                    if interrupted:
                        kept = "" if folder is None else f"; {folder} goes on from there"
                        return f"interrupted after step {state.step}{kept}"
        return ""

    def _steps(self, epoch: int) -> Iterable[tuple[int, list[Samples]]]:
        """Return the remaining steps of an epoch."""
        options, accelerator = self.options, self.accelerator
        place = (accelerator.process_index, accelerator.num_processes)
        steps = steps_of(self.fitted, epoch, options.seed, self.micro, options.accumulate, place)
        done = self.state.step - epoch * self.per_epoch
        return (step for number, step in enumerate(steps) if number >= done)

    def _step(self, size: int, parts: list[Samples]) -> float:
        """Take one step of the optimizer; return the mean loss over the global batch."""
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        dtype = dtype_of(self.student)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with _synchronizing(accelerator, self.model, last), accelerator.autocast():
                batch = part.to(accelerator.device, dtype)
                summed = self.objective(self.model, batch, self.pairs)
                # DDP takes the mean over workers; the sum of all samples is what is divided here.
                accelerator.backward(summed / size * accelerator.num_processes)
            total += summed.detach().double()
        mean = float(accelerator.reduce(total, "sum")) / size
        if math.isfinite(mean):
            accelerator.clip_grad_norm_(self.model.parameters(), _CLIP)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return mean

    def _advance(self, loss: float) -> None:
        state = self.state
        state.step += 1
        rate = float(self.optimizer.param_groups[0]["lr"])
        state.steps.append((state.step, loss, rate))
        self.schedule.step()
        if state.recentering is not None:
            state.recentering()
        if state.step % self.per_epoch == 0:
            self._next_epoch()

    def _next_epoch(self) -> None:
        if isinstance(self.objective.target, OnlineLabelSmoothing):
            missing = self.objective.target.next_epoch()
            if missing:
                names = ", ".join(map(str, missing[:10]))
                line = f"classes without a right answer in an epoch keep their labels: {names}"
                self.notes = [*dict.fromkeys([*self.notes, line])]

    def _evaluate(self) -> None:
        state = self.state
        held, _ = self.held.measure(self.student)
        done = state.recentering is None or state.step >= self.annealed
        if done and state.recentering is not None and state.best["step"] < self.annealed:
            state.agreements.append((state.step, held))
            state.keep(held)  # The first plain norms: what came before has other norms.
        elif done:
            state.note(held)
        else:
            state.agreements.append((state.step, held))

    def _line(self, loss: float, seconds: float) -> str:
        held = self.state.agreements[-1][1]
        rate = self.state.steps[-1][2]
        return (
            f"step {self.state.step} of {self.total}: loss {loss:.4f}, rate {rate:.2g}, {held}, "
            f"{seconds:.0f} s left"
        )

    # -- setting up ---------------------------------------------------------------------------

    def _prepare(self, prints: dict[str, str]) -> None:
        options, accelerator = self.options, self.accelerator
        self.pairs = self._features() if options.features else []
        self.student.train()
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # What no swap replaced keeps its statistics.
        self.before = self.held.measure(self.student)
        rate = options.rate or default_rate(options.optimizer, self.before[0].error)
        optimizer = _optimizer(options, self.student, rate, self.batch, len(self.fitted))
        rising = round(options.warmup * self.total)
        start = min(1.0, REFERENCE_BATCH / self.batch) if self.batch > REFERENCE_BATCH else 0.1
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup(step, rising, start) * _falling(step, rising, self.total),
        )
        self.annealed = max(1, round(0.7 * self.total))
        recentering = Recentering(self.student, self.annealed) if options.recenter else None
        self.model, self.optimizer = accelerator.prepare(self.student, optimizer)
        self.schedule = schedule
        plan = {"samples": len(self.fitted), "steps": self.total, "options": repr(options)}
        self.state = LoopState(self.student, self.objective.target, recentering, plan, prints)
        if self.objective.target is not None:
            self.objective.target.to(accelerator.device)

    def _features(self) -> list[Pair]:
        pairs = swapped_norms(self.student, self.teacher)
        if not pairs:
            raise OptionError("features: the student has no norm in the place of a BatchNorm")
        pairs, notes = aligned(pairs, self.student, self.teacher, self.fitted)
        self.notes += notes
        if not pairs:
            raise OptionError(
                "features: no swapped norm has the channels of the teacher's: train without"
            )
        return pairs

    def _check_labels(self, classes: int) -> None:
        assert self.fitted.labels is not None
        _check_shape(self.fitted.labels, self.held.outputs[0])
        check_labels(self.fitted.labels, classes)
        check_labels(self.held.samples.labels, classes)  # type: ignore[arg-type]  # labelled as those that are fitted
        counts = torch.bincount(self.fitted.labels[self.fitted.labels >= 0], minlength=classes)
        if empty := torch.nonzero(counts == 0).flatten().tolist():
            names = ", ".join(map(str, empty[:10]))
            self.notes.append(f"{len(empty)} classes have no sample to train on: {names}")


def _check_shape(labels: Tensor, output: Tensor) -> None:
    given, wanted = tuple(labels.shape[1:]), tuple(output.shape[2:])
    if given != wanted:
        raise OptionError(f"labels of one sample: shape {given}; its output asks for {wanted}")


def _optimizer(
    options: RecoverOptions, student: nn.Module, rate: float, batch: int, samples: int
) -> torch.optim.Optimizer:
    """Return the optimizer: decay for matrices only, the rate scaled from a batch of 32."""
    decay = normalized_decay(options.weight_decay, batch, samples, options.epochs)
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in
              parameter_groups(student, decay)]  # fmt: skip
    rate = rate_of(options.optimizer, rate, batch)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)


def _fingerprints(student: nn.Module, teacher: nn.Module, held: Samples) -> dict[str, str]:
    """Return digests of what a saved state belongs to."""
    given = {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "data": [held.inputs.args, dict(held.inputs.kwargs), held.labels],
    }
    return {name: fingerprint(value) for name, value in given.items()}


def _falling(step: int, rising: int, total: int) -> float:
    """Return the factor of a cosine from 1 to 0 over the steps behind the warmup."""
    part = max(0, step - rising) / max(1, total - rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def _synchronizing(accelerator: Any, model: nn.Module, last: bool) -> Any:
    """Return a context in which gradients are shared by the workers only at the last batch."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)
