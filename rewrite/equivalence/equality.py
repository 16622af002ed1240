"""Judge the equality of two models in float64, and collect the errors in their own dtype.

The equations are those of `rewrite.equivalence.verify`; here they are evaluated case by case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewrite.equivalence.compare import Comparison, compare
from rewrite.equivalence.deployed import (
    deployed_mode,
    gradient_reasons,
    kind_reasons,
    path_reasons,
    same_classes,
)
from rewrite.equivalence.divergence import Divergence, compare_records, recorded, value_noise
from rewrite.equivalence.exactness import Exact, misrounded, present
from rewrite.equivalence.record import Record, Sketcher
from rewrite.equivalence.rounding import EXPLAINS, Perturbation, perturbed, stored_rounding
from rewrite.equivalence.training import judge_training
from rewrite.equivalence.variations import adversarial
from rewrite.equivalence.verification import Case, Level, Verification
from rewrite.errors import VerificationError, one_line
from rewrite.outcomes import Contract
from rewrite.progress import Countdown
from rewrite.runtime.float64 import in_float64, narrowest_eps, short_of_memory
from rewrite.runtime.inputs import Inputs, call
from rewrite.runtime.modes import isolated, widen
from rewrite.runtime.tree import join

TOLERANCE = 1e-9
"""How far two values of equal models may be apart in float64, relative."""


_AMPLIFIED = 10
"""So many times what a float64 rounding of all tensors and inputs does to the original explains an
error: an input, or a value, that is apart by no more proves nothing."""


# On these variations every value on the way is compared: a channel that is dead on one input lives
# on another.
_VALUES_TOO = ("normal x 10", "batch of 7")


_WIDEST_ROUNDING = torch.finfo(torch.float64).eps


@dataclass
class Findings:
    """The findings of one verification, collected case by case."""

    cases: list[Case] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    agreed: float = 0.0
    predictions: int = 0
    cosines: list[float] = field(default_factory=list)
    nothing: list[bool] = field(default_factory=list)
    drift: float | None = None
    noise: float | None = None
    rounding: float | None = None
    divergence: Divergence | None = None
    runs: tuple[Record, Record] | None = None

    def measure(self, compared: Comparison) -> None:
        """Add the agreement of one pair of outputs."""
        self.nothing.append(compared.nothing)
        if compared.agreement is not None:
            self.agreed += compared.agreement * compared.predictions
            self.predictions += compared.predictions
        if compared.cosine is not None:
            self.cosines.append(compared.cosine)

    def fail(self, name: str, inputs: Inputs, reason: str) -> None:
        """Record an input on which the rewritten model fails."""
        self.reasons.append(f"{name}: {reason}")
        self.cases.append(Case(name, str(inputs), failed=True))

    def sum_up(self, contract: Contract, level: Level, seconds: float) -> Verification:
        """Return the result over all cases."""
        return Verification(
            contract=contract,
            level=level,
            max_abs=max((case.max_abs for case in self.cases), default=0.0),
            max_rel=max((case.max_rel for case in self.cases), default=0.0),
            agreement=self.agreed / self.predictions if self.predictions else None,
            predictions=self.predictions,
            cosine=min(self.cosines, default=None),
            drift=self.drift,
            noise=self.noise,
            rounding=self.rounding,
            cases=tuple(self.cases),
            reasons=tuple(dict.fromkeys(self.reasons)),
            divergence=self.divergence,
            seconds=seconds,
            runs=self.runs,
        )


def run_original(model: nn.Module, name: str, inputs: Inputs, seed: int) -> Any:
    """Run the original on an input that it must accept.

    Raises:
        VerificationError: it raises on that input.
    """
    with original_takes(name, inputs):
        return call(model, inputs.clone(), seed)


@contextlib.contextmanager
def original_takes(name: str, inputs: Inputs) -> Iterator[None]:
    """Turn any exception of the original into a VerificationError that names the inputs."""
    try:
        yield
    except Exception as error:
        raise VerificationError(
            f"{name}: the original does not run on ({inputs}): {one_line(error)}; "
            "pass another --input"
        ) from error


def judge(
    a: nn.Module,
    b: nn.Module,
    given: list[tuple[str, Inputs]],
    contract: Contract,
    level: Level,
    *,
    touched: Collection[str] = (),
    exact: Exact,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Judge whether `b` equals `a`; both are in eval mode.

    Args:
        a: the original.
        b: the rewritten model.
        given: the user's inputs, each with its name.
        contract: "exact" or "exact-in-eval".
        level: how many inputs are tried.
        touched: names of rewritten modules; a mapping gives the pass of each.
        exact: unrounded values of tensors of `b`, by qualified name.
        seed: of all random numbers.
        say: called with a line as each input begins.
    """
    exact = present(b, exact)
    rounded = {}
    if any(join(*key) not in exact for key in stored_rounding(b, a)):
        rounded = {key: e for key, e in stored_rounding(a, b).items() if join(*key) not in exact}
    # Asked before the models are opened for float64, which hides what cannot follow.
    floor = max(TOLERANCE, EXPLAINS * narrowest_eps(a))
    work = _Judge(a, b, rounded, touched, seed, floor)
    work.found.reasons += misrounded(b, exact)
    thorough = level is Level.THOROUGH
    variations = sum(1 for _ in adversarial(given[0][1], seed)) if thorough else 0
    step = Countdown(say, "verifying", 2 * len(given) + variations)
    for name, inputs in given:
        step(f"{name} as it is stored")
        work.run_native(name, inputs)
    if thorough or contract is Contract.EXACT or not same_classes(a, b):
        work.compare_gradients(*given[0])
    with in_float64(a, b, streamed=short_of_memory(a, b), exact=exact):
        for index, (name, inputs) in enumerate(given):
            step(f"{name} in float64")
            work.judge_given(name, inputs, index)
        for name, inputs in adversarial(given[0][1], seed) if thorough else ():
            step(name)
            work.judge_variation(name, inputs)
        work.sum_up()
        if thorough and contract is Contract.EXACT:
            # A step in train mode writes statistics: it comes last.
            for case, reasons in judge_training(a, b, given[0][1], work.allowance, seed):
                work.found.cases.append(case)
                work.found.reasons += reasons
    return work.found


@dataclass
class _Judge:
    """One judgement in progress."""

    a: nn.Module
    b: nn.Module
    stored: Mapping[tuple[str, str], float]
    touched: Collection[str]
    seed: int
    floor: float
    found: Findings = field(default_factory=Findings)
    native: list[tuple[Any, Any]] = field(default_factory=list)
    apart: list[tuple[float, str]] = field(default_factory=list)

    @property
    def allowance(self) -> float:
        """The largest relative difference of outputs that passes."""
        return self.floor + EXPLAINS * (self.found.rounding or 0.0)

    def run_native(self, name: str, inputs: Inputs) -> None:
        """Run both models in their own dtype, as their users do."""
        with original_takes(name, inputs):
            mode, before = deployed_mode(self.a, inputs, self.seed)
        try:
            with isolated(self.b):
                after = call(self.b, inputs.clone(), self.seed, mode)
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            self.found.fail(name, inputs, f"the rewritten model fails: {one_line(error)}")
            after = None
        self.native.append((before, after))

    def compare_gradients(self, name: str, inputs: Inputs) -> None:
        """Compare both models with gradients enabled, on the first input."""
        without = compare(*self.native[0], dtypes=False).max_rel
        reasons = gradient_reasons(self.a, self.b, inputs, self.seed, without)
        self.found.reasons += [f"{name}: {reason}" for reason in reasons]

    def judge_given(self, name: str, inputs: Inputs, index: int) -> None:
        """Judge an input of the user; value by value, if stored parameters were rounded.

        Raises:
            VerificationError: it cannot be run in float64.
        """
        before, after = self.native[index]
        if after is None:
            return
        wide = inputs.map(widen)
        try:
            exact, compared = self._values(name, wide)
        except Exception as error:
            raise VerificationError(
                f"{name}: cannot be judged in float64: {one_line(error)}"
            ) from error
        self._settle(name, inputs, wide, exact, compared)
        drift = compare(before, after)
        self.found.drift = max(self.found.drift or 0.0, drift.max_abs)
        own = compare(exact, before, dtypes=False)
        self.found.noise = max(self.found.noise or 0.0, own.max_abs)
        self.found.measure(drift)
        reasons = [*kind_reasons(before, after, drift)]
        if path_reasons(drift, own.max_rel):
            # A difference of equal values is rounding alone, whatever float64 says of it.
            moved = _AMPLIFIED * self._sensitivity(wide, exact)
            reasons += path_reasons(drift, max(own.max_rel, moved))
        self.found.reasons += [f"{name}: {reason}" for reason in reasons]

    def judge_variation(self, name: str, inputs: Inputs) -> None:
        """Judge a generated input, which the original may reject."""
        wide = inputs.map(widen)
        try:
            before = call(self.a, wide.clone(), self.seed)
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            why = f"the original refuses it: {one_line(error)}"
            self.found.cases.append(Case(name, str(inputs), skipped=why))
            return
        try:
            if name in _VALUES_TOO:
                self._settle(name, inputs, wide, *self._values(name, wide))
                return
            after = call(self.b, wide.clone(), self.seed)
        except Exception as error:  # noqa: BLE001 - likewise
            self.found.fail(name, inputs, f"the rewritten model fails: {one_line(error)}")
            return
        compared = compare(before, after)
        if self.stored and compared.max_rel > self.allowance:
            self._measure_rounding(wide, before)
        self._settle(name, inputs, wide, before, compared)

    def _values(self, name: str, wide: Inputs) -> tuple[Any, Comparison]:
        """Compare both models value by value, within the noise that rounding explains."""
        sketch = Sketcher(self.seed)
        record_a, before = recorded(self.a, wide, sketch, self.seed)
        record_b, after = recorded(self.b, wide, sketch, self.seed)
        if self.stored:
            with perturbed(self.a, self.stored, self.seed):
                record_n, moved = recorded(self.a, wide, sketch, self.seed)
            own = compare(before, moved).max_rel
            self.found.rounding = max(self.found.rounding or 0.0, own)
            noise = value_noise(record_a, record_n)
        else:
            noise = [self.floor / EXPLAINS] * len(record_a.values)
        parted = compare_records(record_a, record_b, noise, self.touched)
        if parted is not None and not self.stored:
            # Values that float64 itself does not tell apart are no proof.
            with perturbed(self.a, None, self.seed):
                record_n, _ = recorded(self.a, self._moved(wide), sketch, self.seed)
            amplified = (_AMPLIFIED * own for own in value_noise(record_a, record_n))
            noise = list(map(max, noise, amplified))
            parted = compare_records(record_a, record_b, noise, self.touched)
        first = parted is not None and self.found.divergence is None
        if first or self.found.runs is None:
            self.found.runs = record_a, record_b
        if parted is not None and first:
            self.found.divergence = parted
            self.found.reasons.append(
                f"{name}: {parted.target or 'the forward'} ({parted.function}) is off by "
                f"{parted.error_out:.1e} relative, beyond what rounding does to it"
            )
        return before, compare(before, after)

    def _measure_rounding(self, wide: Inputs, before: Any) -> None:
        with perturbed(self.a, self.stored, self.seed):
            moved = compare(before, call(self.a, wide.clone(), self.seed)).max_rel
        self.found.rounding = max(self.found.rounding or 0.0, moved)

    def _settle(
        self, name: str, inputs: Inputs, wide: Inputs, before: Any, compared: Comparison
    ) -> None:
        """Decide one case: equal, different, or inconclusive."""
        apart = compared.max_rel > self.allowance
        if apart and not self.apart:
            own = self._sensitivity(wide, before)
            if own * _AMPLIFIED >= compared.max_rel:
                why = f"rounding alone moves the original by {own:.1e}"
                self.found.cases.append(Case(name, str(inputs), compared.max_abs, 0.0, why))
                return
        if apart:
            self.apart.append((compared.max_rel, f"{compared.worst} on {name}"))
        self.found.reasons += [f"{name}: {reason}" for reason in compared.reasons]
        failed = apart or bool(compared.reasons)
        distance = (compared.max_abs, compared.max_rel)
        self.found.cases.append(Case(name, str(inputs), *distance, failed=failed))
        if failed and self.found.divergence is None:
            self.found.divergence = self._locate(wide)

    def _locate(self, wide: Inputs) -> Divergence | None:
        sketch = Sketcher(self.seed)
        record_a, _ = recorded(self.a, wide, sketch, self.seed)
        record_b, _ = recorded(self.b, wide, sketch, self.seed)
        noise: list[float] = []
        if self.stored:
            with perturbed(self.a, self.stored, self.seed):
                noise = value_noise(record_a, recorded(self.a, wide, sketch, self.seed)[0])
        return compare_records(record_a, record_b, noise, self.touched)

    def _sensitivity(self, wide: Inputs, before: Any) -> float:
        """Return the relative change of the original's output when its tensors are rounded."""
        with perturbed(self.a, None, self.seed):
            return compare(before, call(self.a, self._moved(wide), self.seed)).max_rel

    def _moved(self, wide: Inputs) -> Inputs:
        """Return the inputs, perturbed by a float64 rounding."""
        nudge = Perturbation(self.seed)

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float64:
                return leaf
            return nudge(leaf, 2 * _WIDEST_ROUNDING)

        return wide.map(moved)

    def sum_up(self) -> None:
        """Add the reason, in one line: the largest error and on how many inputs, or no proof."""
        cases = self.found.cases
        if cases and all(case.skipped for case in cases) and not self.found.reasons:
            self.found.reasons.append(f"no input tells the models apart: {cases[0].skipped}")
        if not self.apart:
            return
        worst, where = max(self.apart)
        count = f"{len(self.apart)} of {sum(not case.skipped for case in cases)} inputs"
        self.found.reasons.insert(
            0, f"{where} differs by {worst:.1e} relative in float64 ({count} differ)"
        )
