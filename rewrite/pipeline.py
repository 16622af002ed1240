"""`convert`: copy the model, apply each pass, hold each to its contract, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from rewrite import registry
from rewrite.convertible import check_convertible, why_not_run
from rewrite.errors import OptionError, PassError, RewriteError
from rewrite.progress import Announced
from rewrite.protocol import Change, Contract, Pass, Selection, apply_pass
from rewrite.report import PassReport, Report
from rewrite.tree import copy_model

if TYPE_CHECKING:
    from rewrite.verify import Verification

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
            original = _noted(before, inputs if runs else None, seed)
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
    from rewrite.calibrate import first_usable
    from rewrite.inputs import infer_example_inputs

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
    from rewrite.verify import Level, verify

    return verify(
        before, after, inputs, contract=contract, level=Level.QUICK, touched=touched, seed=seed,
    )  # fmt: skip


def _noted(model: nn.Module, inputs: tuple[Any, ...] | None, seed: int) -> Noted:
    """Return what has to be remembered of a model that is rewritten in place."""
    tensors = _identities(model)
    if inputs is None:
        return Noted(None, tensors)
    from rewrite.float64 import evaluating
    from rewrite.inputs import Inputs
    from rewrite.judge import run_original

    with evaluating(model):
        return Noted(run_original(model, "given", Inputs(inputs), seed), tensors)


class Noted(nn.Module):
    """What is remembered of a consumed model: what it answered, and which tensors it held."""

    def __init__(self, outputs: Any, tensors: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.outputs = outputs
        self.tensors = tensors

    def forward(self, *inputs: Any) -> Any:
        """Return what the model answered."""
        return self.outputs

    def violations(self, after: nn.Module, touched: set[str]) -> tuple[str, ...]:
        """Return the tensors outside of `touched` that are not the very ones from before."""
        now = _identities(after)
        return tuple(
            name
            for name, identity in self.tensors.items()
            if now.get(name) != identity
            and not any(name == part or name.startswith(f"{part}.") for part in touched)
        )


def _identities(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return which object each tensor is, and how often it has been written."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: (id(tensor), tensor._version) for name, tensor in tensors}


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
    if isinstance(before, Noted):
        return before.violations(after, _touched(changes))
    from rewrite.verify import check_untouched

    return tuple(check_untouched(before, after, _touched(changes)))
