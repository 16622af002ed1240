"""Numerical equivalence of two models, judged in float64 and reported in the models' own dtype.

    error(x) = max |a64(x) - b64(x)| / max |a64(x)|      exact contracts: at most 1e-9
    drift(x) = max |a(x)   - b(x)  |                     in the model's own dtype: a number
    noise(x) = max |a(x)   - a64(x)|                     the rounding of the original: its scale

A correct rewrite differs by about 1e-13 in float64 and a wrong one by 1e-3 and more, so the exact
tolerance does not matter. If the unrounded parameters of the rewrite are known, those are compared,
and their rounding is checked separately (`rewrite.equivalence.exactness`). If not, the difference
that rounding to a narrower dtype explains is measured and allowed, for each intermediate value
(`rewrite.equivalence.rounding`). The drift is only reported, beside the noise.

1. `exact`: equal in eval and in train mode, with equal gradients and running statistics.
2. `exact-in-eval`: equal in eval mode.
3. `approximate`, `redefining`: `b` runs, has the same structure, shapes and dtypes, is finite and
   deterministic. The agreement of both is measured, but not judged.

An input on which float64 does not suffice (the original changes as much when its own tensors are
perturbed by one rounding) is inconclusive: it is left out and named.
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
    """Check that `b` keeps `contract` with respect to the original `a`; neither is changed.

    Args:
        a: the original.
        b: the rewritten model.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; without
            them inputs are inferred from the layers of `a`.
        calibration: batches of real data; the first eight are inputs as well.
        contract: the contract of `b`, or its text.
        level: quick or thorough.
        touched: qualified names of the rewritten modules, if known; a mapping gives the pass of
            each, which the report of a divergence then names.
        calls: further calls to judge, with their names; if the contract is exact and the model
            generates text, 16 greedy tokens must be equal as well.
        exact: the unrounded float64 tensors of `b` by qualified name, if known; these are
            compared, and their rounding is checked separately.
        seed: of all random numbers, so that two runs use the same inputs.
        progress: called with a line as each input begins: its name, and the time left.

    Returns:
        The result, true if the contract holds.

    Raises:
        OptionError: the contract or the level is unknown.
        VerificationError: no input is known, or the original raises on a given input or returns
            nothing but NaN.
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
    return found.sum_up(contract, level, time.perf_counter() - begin)


def check_untouched(before: nn.Module, after: nn.Module, touched: Collection[str]) -> list[str]:
    """Return the names of parameters and buffers that changed outside of `touched`.

    A module named in `touched` may change its own tensors, and everything below it if its class
    changed; a tensor named there may change. All others must be bit-identical.
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
    """Return the layer whose weight the parametrization `name` computes, None for other names."""
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
    """Return the given inputs, or else inferred ones, each with its name."""
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
    """Measure the agreement of different functions; check that `b` runs and is deterministic."""
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
