"""`convert`: copy the model, apply each pass, hold each to its contract, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from rewrite import registry
from rewrite.errors import OptionError, PassError, RewriteError
from rewrite.outcomes import Change, Contract, Selection
from rewrite.preconditions import check_convertible, why_not_run
from rewrite.progress import Announced
from rewrite.protocol import Pass, apply_pass
from rewrite.report import PassReport, Report
from rewrite.runtime.copying import copy_model
from rewrite.snapshot import Snapshot, take_snapshot

if TYPE_CHECKING:
    from rewrite.equivalence.verification import Verification


Model = TypeVar("Model", bound=nn.Module)


_EQUAL = (Contract.EXACT, Contract.EXACT_IN_EVAL)


_WEAKEST_LAST = (
    Contract.EXACT,
    Contract.EXACT_IN_EVAL,
    Contract.APPROXIMATE,
    Contract.REDEFINING,
)


@dataclass(frozen=True)
class Result(Generic[Model]):
    """A rewritten copy of a model, and what was done to it."""

    model: Model
    report: Report


def convert(
    model: Model,
    passes: Sequence[Pass | str],
    *,
    example_inputs: tuple[Any, ...] | None = None,
    calibration: Iterable[Any] | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    consume: bool = False,
) -> Result[Model]:
    """Return a rewritten copy of `model`; the argument is untouched.

    Tensors that no pass touches share storage with the argument, copy-on-write; those that a pass
    touches exist twice, unless the argument may be consumed.

    Args:
        model: any module, in any mode and dtype, on any device.
        passes: passes, or their text form, applied in this order.
        example_inputs: positional inputs of the forward. They make shapes known to the passes and
            are what verification runs on; without them the first batch of `calibration` is taken,
            or an input is inferred where possible.
        calibration: batches for passes that fit to data.
        only, skip: shell patterns on qualified names; `skip` wins.
        verify: whether to run both models and check each pass's contract.
        seed: of everything random here.
        progress: called with the name of each step as it begins.
        consume: the argument is given up: where a single pass promises no equality, it is rewritten
            in place, against the original's outputs noted before, and memory stays near one model.

    Raises:
        CaptureError: the model is TorchScript.
        OptionError: an empty list of passes, an unknown pass, or options that do not fit.
        PassError: a pass failed; the message names the passes that had run.
    """
    chosen = [registry.parse(item) if isinstance(item, str) else item for item in passes]
    if not chosen:
        raise OptionError("no pass given; see `rewrite passes`")
    check_convertible(model)
    selection = Selection(tuple(only), tuple(skip))
    say = progress or (lambda step: None)
    inputs: tuple[Any, ...] | None = example_inputs
    notes: tuple[str, ...] = ()
    runs = verify
    if verify and (reason := why_not_run(model)):
        runs, notes = False, (f"{reason}: nothing was run",)
    elif verify:
        inputs, notes = _inputs(model, example_inputs, calibration)
    before: nn.Module = model
    expected: nn.Module
    reports: list[PassReport] = []
    for item in chosen:
        say(item.name)
        start = time.perf_counter()
        original = None
        if consume and len(chosen) == 1 and item.contract not in _EQUAL:
            original = take_snapshot(before, inputs if runs else None, seed)
        after = before if original is not None else copy_model(before)
        try:
            batches = None if calibration is None else Announced(calibration, say, item.name)
            applied = apply_pass(item, after, inputs, batches, selection)
        except RewriteError as error:
            if reports and isinstance(error, PassError):
                done = ", ".join(report.spec for report in reports)
                raise PassError(f"{error} (after {done})") from error
            raise
        seconds = time.perf_counter() - start
        after = applied.model
        notes = (*notes, *applied.notes)
        checked = None
        if runs and inputs is not None and applied.changes:
            say(f"verifying {item.name}")
            expected = item.reference(before) if original is None else original
            touched = dict.fromkeys(_touched(applied.changes), item.name)
            checked = _check(expected, after, inputs, item.contract, touched, seed)
        reports.append(
            PassReport(
                registry.spec(item), str(item.contract), applied.changes, applied.skips, seconds,
                _violations(original or before, after, applied.changes) if verify else (),
                checked,
            )
        )  # fmt: skip
        before = after
    whole = reports[-1].verification if len(reports) == 1 else None
    if len(reports) > 1 and runs and inputs is not None:
        contract = max((item.contract for item in chosen), key=_WEAKEST_LAST.index)
        expected = model
        for item in chosen:
            expected = item.reference(expected)
        whole = _check(expected, before, inputs, contract, _passes_of(chosen, reports), seed)
    return Result(before, Report(tuple(reports), notes, whole))  # type: ignore[arg-type]


def _inputs(
    model: nn.Module, given: tuple[Any, ...] | None, calibration: Iterable[Any] | None
) -> tuple[tuple[Any, ...] | None, tuple[str, ...]]:
    """Return what to verify on: the given input, a batch of the data, or one that is made up."""
    if given is not None:
        return tuple(given), ()
    from rewrite.calibration.batches import first_usable
    from rewrite.runtime.infer_inputs import infer_example_inputs

    # An iterator can be read once only, and its batches are for the fit.
    if calibration is not None and not isinstance(calibration, Iterator):
        inputs = first_usable(model, calibration)
        if inputs is not None and not inputs.kwargs:
            return tuple(inputs.args), ("verified on the first batch of the calibration data",)

    inferred = infer_example_inputs(model, quick=True)
    if inferred is None:
        return None, ("no input is known, so nothing was run or compared; pass an example input",)
    shapes = ", ".join("×".join(map(str, x.shape)) for x in inferred if hasattr(x, "shape"))
    return inferred, (f"no input was given: verified on a random one of shape {shapes}",)


def _check(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    contract: Contract,
    touched: Mapping[str, str],
    seed: int,
) -> Verification:
    from rewrite.equivalence.verification import Level
    from rewrite.equivalence.verify import verify

    return verify(
        before, after, inputs, contract=contract, level=Level.QUICK, touched=touched, seed=seed,
    )  # fmt: skip


def _touched(changes: tuple[Change, ...]) -> set[str]:
    return {name for change in changes for name in change.touched}


def _passes_of(chosen: Sequence[Pass], reports: Sequence[PassReport]) -> dict[str, str]:
    """Return by which passes each module was touched, in their order."""
    passes: dict[str, list[str]] = {}
    for item, report in zip(chosen, reports, strict=True):
        for name in _touched(report.changes):
            passes.setdefault(name, []).append(item.name)
    return {name: ", ".join(names) for name, names in passes.items()}


def _violations(
    before: nn.Module, after: nn.Module, changes: tuple[Change, ...]
) -> tuple[str, ...]:
    """Return the tensors that changed although no change names their module."""
    if isinstance(before, Snapshot):
        return before.violations(after, _touched(changes))
    from rewrite.equivalence.verify import check_untouched

    return tuple(check_untouched(before, after, _touched(changes)))
