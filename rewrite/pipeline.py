"""`convert`: copy the model, apply each pass, hold each to its contract, report.

A site that breaks the contract of its pass is found, left out with the reason, and the rest is done
again: one bad site does not cost a model the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from rewrite import registry
from rewrite.errors import ContractError, PassError, VerificationError
from rewrite.graph.capture import capture
from rewrite.memory import rare_collection
from rewrite.observe.calls import known_calls
from rewrite.offenders import offenders
from rewrite.outcomes import Contract, Selection
from rewrite.preconditions import check_convertible, why_not_run
from rewrite.progress import Announced
from rewrite.protocol import Applied, Pass, apply_pass, find_sites
from rewrite.report import PassReport, Report, advice, violation
from rewrite.runtime.copying import copy_model
from rewrite.runtime.infer_inputs import has_certain_rank, infer_inputs
from rewrite.runtime.inputs import ExampleCall, Inputs
from rewrite.runtime.leaves import tensors
from rewrite.snapshot import Snapshot, take_snapshot

if TYPE_CHECKING:
    from rewrite.equivalence.verification import Verification


Model = TypeVar("Model", bound=nn.Module)


_EQUAL = (Contract.EXACT, Contract.EXACT_IN_EVAL)


@dataclass(frozen=True)
class Result(Generic[Model]):
    """A rewritten copy of a model, and what was done to it."""

    model: Model
    report: Report

    def __repr__(self) -> str:
        return f"<Result: {type(self.model).__name__}, {self.report!r}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the report."""
        return self.report._repr_html_()


@rare_collection()
def convert(
    model: Model,
    passes: Pass | type[Pass] | str | Iterable[Pass | type[Pass] | str],
    *,
    example_inputs: Any = None,
    example_calls: Sequence[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    verify: bool = True,
    check: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    consume: bool = False,
) -> Result[Model]:
    """Return a rewritten copy of `model`; the argument is untouched.

    Tensors that no pass touches share storage with the argument, copy-on-write; those that a pass
    touches exist twice, unless the argument may be consumed.

    Args:
        model: any module, in any mode and dtype, on any device.
        passes: a pass, its class or its text form, or several of these, applied in this order.
        example_inputs: what the forward takes: a tensor, a tuple of positional inputs or a dict of
            keywords. They make shapes known to the passes and are what verification runs on;
            without them the first batch of `calibration` is taken, or an input is inferred.
        example_calls: several calls, each as `example_inputs`. Where a forward cannot be traced,
            what they show is the evidence, and all of them are verified. Without them a model of
            transformers is called as its users call it: with and without a padded mask, with a
            cache, with a batch of two.
        calibration: batches for passes that fit to data.
        only: one shell pattern on qualified names, or several; what matches none is left alone.
        skip: patterns likewise; what matches one is left alone, also where `only` matches.
        verify: whether to run both models and check each pass's contract.
        check: whether a broken contract is an error; without, `report.ok` says it.
        seed: of everything random here.
        progress: called with the name of each step as it begins.
        consume: the argument is given up: where a single pass promises no equality, it is rewritten
            in place, against the original's outputs noted before, and memory stays near one model.

    Raises:
        CaptureError: the model is no module, or TorchScript.
        ContractError: the result breaks a contract, also without the sites that are suspected.
        OptionError: no pass, an unknown one, or options that do not fit.
        PassError: a pass failed; the message names the passes that had run.
        VerificationError: the model does not run on the example inputs.
    """
    chosen = registry.as_passes(passes)
    check_convertible(model)
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    calls = known_calls(model, inputs, example_calls, seed)
    if inputs is None and calls:
        inputs = calls[0].inputs
    notes: tuple[str, ...] = ()
    shown = inputs is not None or calibration is not None
    runs = verify
    if verify and (reason := why_not_run(model)):
        runs, notes = False, (f"{reason}: nothing was run",)
    elif verify:
        inputs, notes = _inputs(model, inputs, calibration)
    evidence = inputs if shown or has_certain_rank(model) else None
    work = _Conversion(
        inputs, evidence, runs and inputs is not None, verify, calibration, seed,
        progress or (lambda _: None), calls,
    )  # fmt: skip
    selection = Selection.of(only, skip)
    before: nn.Module = model
    reports: list[PassReport] = []
    for pass_ in chosen:
        attempt = work.apply(pass_, before, selection, reports, consume and len(chosen) == 1)
        before = attempt.applied.model
        notes = (*notes, *attempt.applied.notes)
        reports.append(attempt.report(pass_))
    whole = reports[-1].verification
    if len(reports) > 1:
        whole = work.verify_whole(model, before, chosen, reports)
    fits = any(hasattr(pass_, "keep") for pass_ in chosen)
    notes = (*notes, *advice(whole, notes, of_users=shown, fits=fits))
    result: Result[Model] = Result(before, Report(tuple(reports), notes, whole))  # type: ignore[arg-type]  # a copy has the class of its original
    if check and not result.report.ok:
        raise ContractError(f"{result.report.failure}; check=False returns the result", result)
    return result


def _inputs(
    model: nn.Module, given: Inputs | None, calibration: Iterable[Any] | None
) -> tuple[Inputs | None, tuple[str, ...]]:
    """Return what to verify on: the given input, a batch of the data, or one that is made up.

    Raises:
        VerificationError: the given input has no values.
    """
    if given is not None:
        if any(tensor.is_meta for tensor in tensors([given.args, dict(given.kwargs)])):
            raise VerificationError(
                f"given: ({given}) has no values (meta device): pass one that has, or verify=False"
            )
        return given, ()
    from rewrite.calibration.batches import first_usable

    # An iterator can be read once only, and its batches are for the fit.
    if calibration is not None and not isinstance(calibration, Iterator):
        found = first_usable(model, calibration)
        if found is not None:
            return found, ("verified on the first batch of the calibration data",)

    inferred = infer_inputs(model, quick=True)
    if inferred.inputs is None:
        return None, (f"{inferred.missing}; so nothing was run or compared: pass an example input",)
    inputs = Inputs.of(inferred.inputs)
    shapes = str(inputs).replace("x", "×")
    return inputs, (f"no input was given: verified on a random one of shape {shapes}",)


@dataclass(frozen=True)
class _Attempt:
    """One pass applied to one model, and what was found when it was held to its contract."""

    applied: Applied
    seconds: float
    violations: tuple[str, ...]
    verification: Verification | None

    def report(self, pass_: Pass) -> PassReport:
        """Return it as a part of the report."""
        return PassReport(
            registry.spec(pass_), str(pass_.contract), self.applied.changes, self.applied.skips,
            self.seconds, self.violations, self.verification,
        )  # fmt: skip

    @property
    def failure(self) -> str:
        """Why the contract does not hold, in one line, or ""."""
        if self.violations:
            return violation(self.violations[0])
        if self.verification is not None and not self.verification.ok:
            return self.verification.reasons[0]
        return ""

    def suspects(self) -> tuple[str, ...]:
        """Return the sites that touched the module in which the models first part."""
        divergence = None if self.verification is None else self.verification.divergence
        if divergence is None:
            return ()
        touched = {c.target: c.touched for c in self.applied.changes}
        return tuple(target for target, names in touched.items() if divergence.target in names)


@dataclass(frozen=True)
class _Conversion:
    """What every step of one conversion needs.

    Attributes:
        inputs: what the models take, if that is known.
        evidence: the inputs whose shapes the passes may rely on: those, unless they are made up
            and the model would take other ranks too.
        runs: whether they are run.
        checks: whether tensors that no change names are held to be untouched.
    """

    inputs: Inputs | None
    evidence: Inputs | None
    runs: bool
    checks: bool
    calibration: Iterable[Any] | None
    seed: int
    say: Callable[[str], None]
    calls: tuple[ExampleCall, ...] = ()

    def apply(
        self,
        pass_: Pass,
        before: nn.Module,
        selection: Selection,
        done: Sequence[PassReport],
        consume: bool,
    ) -> _Attempt:
        """Apply one pass, without the sites that break its contract.

        Raises:
            PassError: the pass failed, whichever site was left out.
        """
        self.say(pass_.name)
        consumed = consume and pass_.contract not in _EQUAL
        try:
            attempt = self._attempt(pass_, before, selection, consumed)
            if not attempt.failure or consumed:
                return attempt
            return self._without_offenders(pass_, before, selection, attempt) or attempt
        except PassError as error:
            mended = None
            if not consumed:
                mended = self._without_offenders(pass_, before, selection, error)
            if mended is not None:
                return mended
            if not done:
                raise
            names = ", ".join(report.spec for report in done)
            raise PassError(f"{error} (after {names})", error.target) from error

    def _attempt(
        self, pass_: Pass, before: nn.Module, selection: Selection, consumed: bool = False
    ) -> _Attempt:
        start = time.perf_counter()
        original: nn.Module = before
        if consumed:
            original = take_snapshot(before, self.inputs if self.runs else None, self.seed)
        after = before if consumed else copy_model(before)
        calibration = self.calibration
        if calibration is not None:
            calibration = Announced(calibration, self.say, pass_.name)
        applied = apply_pass(
            pass_, after, self.evidence, calibration, selection, self.calls, keep_exact=self.runs
        )
        seconds = time.perf_counter() - start
        verification = None
        touched = {name: pass_.name for change in applied.changes for name in change.touched}
        if self.runs and applied.changes:
            self.say(f"verifying {pass_.name}")
            expected = original if consumed else pass_.reference(before)
            verification = self._verify(
                expected, applied.model, pass_.contract, touched, applied.exact
            )
        violations = _violations(original, applied.model, touched) if self.checks else ()
        return _Attempt(applied, seconds, violations, verification)

    def _without_offenders(
        self, pass_: Pass, before: nn.Module, selection: Selection, failed: _Attempt | PassError
    ) -> _Attempt | None:
        """Return what the pass does without the sites that break it; None if nothing is left."""
        if isinstance(self.calibration, Iterator):
            return None  # it can be read once only
        sites = self._targets(pass_, before, selection)
        if len(sites) < 2:
            return None
        self.say(f"{pass_.name}: looking for the site that breaks it")

        def attempt(left_out: Mapping[str, str]) -> _Attempt | PassError:
            wanted = replace(selection, left_out={**selection.left_out, **left_out})
            try:
                return self._attempt(pass_, before, wanted)
            except PassError as error:
                return error

        def broken(some: Sequence[str]) -> str:
            return _failure(attempt({site: "left out" for site in sites if site not in some}))

        left_out: dict[str, str] = {}
        outcome = failed
        while suspects := set(_suspects(outcome)) - left_out.keys():
            left_out |= dict.fromkeys(suspects, _reason(_failure(outcome)))
            outcome = attempt(left_out)
            if isinstance(outcome, _Attempt) and not outcome.failure:
                return outcome if outcome.applied.changes else None
        found = offenders(sites, broken)
        outcome = attempt({site: _reason(why) for site, why in found.items()})
        if isinstance(outcome, PassError) or outcome.failure or not outcome.applied.changes:
            return None
        return outcome

    def _targets(self, pass_: Pass, before: nn.Module, selection: Selection) -> tuple[str, ...]:
        captured = capture(copy_model(before), self.evidence, self.calls)
        sites, _ = find_sites(pass_, captured, selection)
        return tuple(dict.fromkeys(site.target for site in sites))

    def verify_whole(
        self,
        model: nn.Module,
        after: nn.Module,
        chosen: Sequence[Pass],
        reports: Sequence[PassReport],
    ) -> Verification | None:
        """Hold the result of all passes to the weakest of their contracts."""
        if not self.runs:
            return None
        expected = model
        for pass_ in chosen:
            expected = pass_.reference(expected)
        contract = Contract.weakest(pass_.contract for pass_ in chosen)
        return self._verify(expected, after, contract, _passes_of(chosen, reports))

    def _verify(
        self,
        before: nn.Module,
        after: nn.Module,
        contract: Contract,
        touched: Mapping[str, str],
        exact: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> Verification:
        from rewrite.equivalence.verification import Level
        from rewrite.equivalence.verify import verify

        return verify(
            before, after, self.inputs, contract=contract, level=Level.QUICK, touched=touched,
            calls=[each for each in self.calls if each.inputs is not self.inputs], exact=exact,
            seed=self.seed, progress=self.say,
        )  # fmt: skip


def _failure(outcome: _Attempt | PassError) -> str:
    return str(outcome) if isinstance(outcome, PassError) else outcome.failure


def _suspects(outcome: _Attempt | PassError) -> tuple[str, ...]:
    if isinstance(outcome, PassError):
        return (outcome.target,) if outcome.target else ()
    return outcome.suspects()


def _reason(failure: str) -> str:
    return f"rewritten, it breaks the contract: {failure}"


def _passes_of(chosen: Sequence[Pass], reports: Sequence[PassReport]) -> dict[str, str]:
    """Return by which passes each module was touched, in their order."""
    passes: dict[str, list[str]] = {}
    for pass_, report in zip(chosen, reports, strict=True):
        for name in {name for change in report.changes for name in change.touched}:
            passes.setdefault(name, []).append(pass_.name)
    return {name: ", ".join(names) for name, names in passes.items()}


def _violations(before: nn.Module, after: nn.Module, touched: Mapping[str, str]) -> tuple[str, ...]:
    """Return the tensors that changed although no change names their module."""
    if isinstance(before, Snapshot):
        return before.violations(after, set(touched))
    from rewrite.equivalence.verify import check_untouched

    return tuple(check_untouched(before, after, touched))
