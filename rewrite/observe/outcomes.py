"""Sites and skips of a pass for norms that tracing could not reach or declined, from example calls.

Tracing comes first: a norm that folds by its graph is left to that. What it declines is decided
again from exported calls of the model: they give the true reason where nothing could be traced, and
they fold more where an operation is known in an exported call and not in a traced graph.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from rewrite.errors import CaptureError
from rewrite.graph.captured import Captured
from rewrite.observe.calls import refusal_of_known_calls
from rewrite.observe.code.check import CodeCheck, CodeIndex
from rewrite.observe.code.fields import UnobservedLine
from rewrite.observe.evidence import Evidence, observe
from rewrite.observe.labels import Unfollowed
from rewrite.observe.norms import norms_of
from rewrite.observe.plan import ObservedFold, ObservedPlanner, Options
from rewrite.outcomes import Declined, Site, Skip


@dataclass(frozen=True, eq=False)
class ObservedSite:
    """The plan of a site that exported calls showed."""

    fold: ObservedFold
    before: str


def evidence_of(captured: Captured, wanted: bool = False) -> Evidence | None:
    """Return what the calls of a captured model show; None where there is nothing to observe.

    Calls are observed where some forward could not be traced, or where that is `wanted`. What
    cannot be exported is noted in `captured.notes`.

    Raises:
        CaptureError: the model refuses a call.
    """
    if captured.observed is None and not captured.example_calls and not captured.unobserved:
        _say_why_no_call(captured)
    if captured.observed is None and captured.example_calls and (wanted or _untraced(captured)):
        try:
            captured.observed = observe(captured.model, captured.example_calls)
        except CaptureError as error:
            if "refuses it" in str(error):
                raise
            captured.notes.append(str(error))
            captured.unobserved = str(error)
            captured.example_calls = ()
            return None
        captured.notes += [f"evidence: the calls {captured.observed.words}"]
        captured.notes += captured.observed.failed
    found: Evidence | None = captured.observed
    return found


def _say_why_no_call(captured: Captured) -> None:
    """Note what a model says to the calls that are known of its kind, where it took none."""
    if _untraced(captured) and (refusal := refusal_of_known_calls(captured.model)):
        captured.unobserved = refusal
        captured.notes.append(refusal)


def observed_outcomes(
    captured: Captured,
    traced: Iterable[Site | Skip],
    options: Options,
    unsure: Container[str] = (),
) -> Iterator[Site | Skip]:
    """Yield the outcomes of tracing, and what exported calls show of those that it declined.

    Args:
        captured: the model, with its calls.
        traced: the outcomes of tracing.
        options: what a user allows.
        unsure: what tracing declined for an operation or a reader that it does not know.
    """
    traced = list(traced)
    skipped = {o.target for o in traced if isinstance(o, Skip) and o.target in unsure}
    more = any(_normalizes(captured, target) for target in skipped)
    evidence = evidence_of(captured, more)
    if evidence is None:
        for outcome in traced:
            yield _because_unobserved(outcome, captured)
        return
    sites = {outcome.target for outcome in traced if isinstance(outcome, Site)}
    traced_whole = not _untraced(captured)
    # What all hidden states hold is known where a model was asked for them, and named.
    options = replace(options, strict_code=traced_whole and evidence.wider is None)
    decided = [item for item in decide(captured, evidence, options) if item[0] not in sites]
    folded = [decision for _, _, decision in decided if isinstance(decision, ObservedFold)]
    folds = {fold.target for fold in folded}
    # A factor behind a norm without an affine part may be its weight: it is folded once.
    owned = {name for fold in folded for name in (fold.weight.tensor, fold.bias)}
    decided = [
        item
        for item in decided
        if item[0] in folds or not sites & {f"{item[0]}.weight", f"{item[0]}.bias"}
    ]
    told = {outcome.target for outcome in traced} if traced_whole else set()
    known = {target for target, _, _ in decided} - told
    for outcome in traced:
        # A product with the weight of a norm is that norm: its class stays here.
        norm = outcome.target.removesuffix(".weight").removesuffix(".bias")
        if outcome.target in owned or norm in folds:
            continue
        if isinstance(outcome, Site) or norm not in known:
            yield outcome
    for target, before, decision in decided:
        if isinstance(decision, ObservedFold):
            yield Site(target, before, None, ObservedSite(decision, before))
        elif target not in told:
            yield Skip(target, before, decision.reason)


def _because_unobserved(outcome: Site | Skip, captured: Captured) -> Site | Skip:
    """Add to the reason of a norm by its input why no call could be observed."""
    owner = outcome.target.removesuffix(".weight").removesuffix(".bias")
    module = captured.tree.names.get(owner)
    by_batch = isinstance(module, nn.modules.batchnorm._NormBase)
    if isinstance(outcome, Site) or not captured.unobserved or by_batch:
        return outcome
    return Skip(outcome.target, outcome.before, f"{captured.unobserved}; traced: {outcome.reason}")


def decide(
    captured: Captured, evidence: Evidence, options: Options
) -> Iterator[tuple[str, str, ObservedFold | Declined]]:
    """Yield (target, what stands there, decision) for each norm that a call showed.

    What the calls allow is held against the code that none of them took, and against what one more
    call returns.
    """
    index = CodeIndex(evidence)
    for target, before, decision in ObservedPlanner(captured, evidence, options).decide():
        final: ObservedFold | Declined = decision
        if isinstance(decision, ObservedFold):
            try:
                CodeCheck(captured, index, decision).check(options.strict_code)
                _check_wider(evidence, decision, options)
            except (UnobservedLine, Unfollowed) as reason:
                final = Declined(str(reason))
        yield target, before, final


def _check_wider(evidence: Evidence, fold: ObservedFold, options: Options) -> None:
    """Note which outputs of a wider call change, or refuse to change any."""
    wider = evidence.wider
    if wider is None:
        return
    calls = {
        n.node: fold.channels for n in norms_of(wider) if n.weight.tensor == fold.weight.tensor
    }
    returned = evidence.follower(wider).follow(calls, all_outputs=True).returned
    paths = [path.removeprefix("output") for path in returned]
    if not paths:
        return
    changes = f"{wider.call.name} would return another {', '.join(dict.fromkeys(paths))}"
    if options.strict_outputs:
        raise Unfollowed(changes)
    fold.notes.append(changes)


def _untraced(captured: Captured) -> bool:
    """Return whether a forward could not be traced, in a model that normalizes by its input."""
    root, name = captured.model, ""
    while name not in captured.opaque and len(children := list(root.named_children())) == 1:
        key, root = children[0]  # a wrapper
        name = f"{name}.{key}" if name else key
    if name in captured.opaque:
        return True
    names = captured.tree.names
    return bool(captured.opaque) and any(_normalizes(captured, name) for name in names)


def _normalizes(captured: Captured, name: str) -> bool:
    """Return whether a module normalizes by its input, over its last axes."""
    held = captured.tree.names.get(name)
    return isinstance(held, nn.LayerNorm | nn.RMSNorm)
