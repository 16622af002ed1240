"""Numerical equivalence of two models, judged in float64 and reported in the models' own dtype.

    error(x) = max |a64(x) - b64(x)| / max |a64(x)|      exact contracts: at most 1e-9
    drift(x) = max |a(x)   - b(x)  |                     in the model's own dtype: a number
    noise(x) = max |a(x)   - a64(x)|                     the rounding of the original: its scale

A right rewrite differs by about 1e-13 in float64 and a wrong one by 1e-3 and more, so no tolerance
has to be chosen between them. Whoever rewrote the model may know what each parameter was before it
was rounded: then those are judged, and the rounding by itself (`rewrite.equivalence.exactness`).
Where nobody does, what the rounding of narrower types explains is measured and allowed
(`rewrite.equivalence.rounding`), for each value on the way. A drift says nothing by itself and is
set against the noise.

1. `exact`: equal in eval and in train mode, with equal gradients and running statistics.
2. `exact-in-eval`: equal in eval mode.
3. `approximate`, `redefining`: runs, same structure, shapes and dtypes, finite, deterministic; how
   often and how well both agree is measured and judged by nobody.

An input on which float64 itself is not enough (the original moves as far when its own tensors move
by one rounding) proves nothing and is left out, by name.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rewrite.equivalence.compare import compare
from rewrite.equivalence.equality import Findings, judge, run_original
from rewrite.equivalence.exactness import Exact
from rewrite.equivalence.generation import compare_generation
from rewrite.equivalence.rounding import identical
from rewrite.equivalence.verification import JUDGED, Case, Level, Verification
from rewrite.errors import VerificationError, one_line
from rewrite.outcomes import Contract, as_choice
from rewrite.runtime.infer_inputs import infer_inputs
from rewrite.runtime.inputs import ExampleCall, Inputs, batches_for, call, device_of
from rewrite.runtime.modes import evaluating, isolated
from rewrite.runtime.tree import Tree
from rewrite.runtime.trial import expendable

__all__ = ["Level", "Verification", "check_untouched", "verify"]


_CALIBRATION_BATCHES = 8


def verify(
    a: nn.Module,
    b: nn.Module,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    contract: Contract | str = Contract.EXACT_IN_EVAL,
    level: Level | str = Level.THOROUGH,
    touched: Collection[str] = (),
    calls: Sequence[ExampleCall] = (),
    exact: Exact | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Hold `b` to `contract` against the original `a`; neither is changed.

    Args:
        a: the original.
        b: the rewritten model.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keywords; without them
            some are inferred from the layers of `a`.
        calibration: batches of your own; the first eight are judged too.
        contract: what `b` promises.
        level: quick or thorough.
        touched: qualified names of the modules that were rewritten, if known (a mapping gives the
            pass of each); the report of a divergence then says which rewrite it lies in.
        calls: calls that are judged beside the example inputs, by their names; where equality is
            promised and the model generates, 16 greedy tokens have to be equal, too.
        exact: what tensors of `b` are before they are rounded, in float64 and by qualified name, if
            whoever made `b` knows it: they are judged, and the rounding by itself.
        seed: of every random number, so that two runs see the same inputs.
        progress: called with a line as each input begins: which it is, and the time left.

    Raises:
        OptionError: no such contract or level.
        VerificationError: no input is known, the original does not run on the given one, or
            returns NaN alone there.
    """
    contract = as_choice(Contract, contract, "contract")
    level = as_choice(Level, level, "level")
    begin = time.perf_counter()
    if example_inputs is None and calls:
        example_inputs, calls = calls[0].inputs, calls[1:]
    given = _given(a, example_inputs, calibration, level, contract, seed)
    given += [(each.name, each.inputs.to(device_of(a))) for each in calls]
    # A forward may count, cache or move tensors: copies run, which share their storage.
    a, b = expendable(a), expendable(b)
    with evaluating(a, b):
        if contract in JUDGED:
            found = judge(
                a, b, given, contract, level, touched=touched, exact=exact or {}, seed=seed,
                say=progress or (lambda _: None),
            )  # fmt: skip
            compare_generation(a, b, given, found)
        else:
            found = _observe(a, b, given, level, seed)
    if contract is not Contract.REDEFINING and not found.reasons and all(found.nothing or [False]):
        raise VerificationError(
            "the original returns NaN alone, so there is nothing to compare; pass another --input"
        )
    return Verification(
        contract=contract,
        level=level,
        max_abs=max((case.max_abs for case in found.cases), default=0.0),
        max_rel=max((case.max_rel for case in found.cases), default=0.0),
        agreement=found.agreed / found.predictions if found.predictions else None,
        predictions=found.predictions,
        cosine=min(found.cosines, default=None),
        drift=found.drift,
        noise=found.noise,
        rounding=found.rounding,
        cases=tuple(found.cases),
        reasons=tuple(dict.fromkeys(found.reasons)),
        divergence=found.divergence,
        seconds=time.perf_counter() - begin,
        runs=found.runs,
    )


def check_untouched(before: nn.Module, after: nn.Module, touched: Collection[str]) -> list[str]:
    """Return the names of parameters and buffers that changed outside of what was touched.

    A module called in `touched` may change its own tensors, and everything below it when it
    became another class; so may a tensor that is called there. Anything else is held to be
    bit-identical.
    """
    old, new = Tree(before), Tree(after)
    free = set(touched)
    replaced = tuple(
        f"{name}." if name else ""
        for name in free
        if name not in old.names
        or name not in new.names
        or type(old.names[name]) is not type(new.names[name])
    )
    wrong = []
    for name in dict.fromkeys((*old.names, *new.names)):
        # Replacing the root frees nothing below it: a GraphModule keeps its children.
        if (
            name in free
            or _computing(name) in free
            or any(prefix and name.startswith(prefix) for prefix in replaced)
        ):
            continue
        wrong += _differing(name, old.names.get(name), new.names.get(name))
    return [name for name in wrong if name not in free]


def _computing(name: str) -> str | None:
    """Return the layer whose weight a parametrization of this name computes, None for others."""
    parts = name.split(".")
    if "parametrizations" not in parts:
        return None
    return ".".join(parts[: parts.index("parametrizations")])


def _differing(name: str, old: nn.Module | None, new: nn.Module | None) -> list[str]:
    left, right = _own_tensors(old), _own_tensors(new)
    return [
        f"{name}.{key}" if name else key
        for key in dict.fromkeys((*left, *right))
        if not identical(left.get(key), right.get(key))
    ]


def _own_tensors(module: nn.Module | None) -> dict[str, torch.Tensor | None]:
    return {} if module is None else {**module._parameters, **module._buffers}


def _given(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
    level: Level,
    contract: Contract,
    seed: int,
) -> list[tuple[str, Inputs]]:
    """Return the inputs that the user gave, or inferred ones."""
    device = device_of(model)
    given = []
    if example_inputs is not None:
        given.append(("given", Inputs.of(example_inputs).to(device)))
    for index, batch in enumerate(itertools.islice(calibration or (), _CALIBRATION_BATCHES)):
        if level is Level.QUICK and given:
            break
        given.append((f"calibration batch {index}", batches_for(model, batch).to(device)))
    if given:
        return given
    # An equality shows on a small image; an agreement is measured at the size of use.
    small = level is Level.QUICK and contract in JUDGED
    inferred = infer_inputs(model, seed, quick=small)
    if inferred.inputs is None:
        raise VerificationError(
            f"{type(model).__name__}: {inferred.missing}; pass --input 1x3x224x224 "
            "(example_inputs=(x,) in Python)"
        )
    return [("inferred", Inputs.of(inferred.inputs).to(device))]


def _observe(
    a: nn.Module, b: nn.Module, given: list[tuple[str, Inputs]], level: Level, seed: int
) -> Findings:
    """Measure two different functions: does `b` run, keep its form, stay finite and repeat."""
    found = Findings()
    with isolated(a), isolated(b):
        for name, inputs in given:
            before = run_original(a, name, inputs, seed)
            try:
                after = call(b, inputs.clone(), seed)
                again = call(b, inputs.clone(), seed) if level is Level.THOROUGH else after
            except Exception as error:  # noqa: BLE001 - a forward may raise anything
                found.fail(name, inputs, f"the rewritten model fails: {one_line(error)}")
                continue
            compared = compare(before, after)
            found.measure(compared)
            reasons = list(compared.structure)
            if not compared.finite and compare(before, before).finite:
                reasons.append("has values that are not finite")
            repeated = compare(after, again)
            if repeated.max_abs or repeated.reasons:
                reasons.append("differs between two runs on the same input")
            found.reasons += [f"{name}: {reason}" for reason in reasons]
            distance = (compared.max_abs, compared.max_rel)
            found.cases.append(Case(name, str(inputs), *distance, failed=bool(reasons)))
    return found
