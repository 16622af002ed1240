"""Sites and skips of the passes that work on streams: evidence, planner, outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rewrite.errors import CaptureError
from rewrite.graph.captured import Captured
from rewrite.observe.evidence import Evidence, observe
from rewrite.outcomes import Site, Skip
from rewrite.runtime.infer_inputs import infer_inputs
from rewrite.runtime.inputs import ExampleCall, Inputs
from rewrite.streams.plan import StreamOptions, StreamPlan, StreamPlanner


@dataclass(frozen=True, eq=False)
class StreamSite:
    """The plan of a site of a stream."""

    plan: StreamPlan
    before: str


def stream_outcomes(
    captured: Captured, planner: type[StreamPlanner], options: StreamOptions
) -> Iterator[Site | Skip]:
    """Yield a site or a skip for each residual stream of a model.

    Calls are those of the model, or one of an input that is made up.

    Raises:
        CaptureError: the model refuses a call.
    """
    evidence = _evidence(captured)
    if evidence is None:
        return
    for target, before, decision in planner(captured, evidence, options).decide():
        if isinstance(decision, StreamPlan):
            yield Site(target, before, None, StreamSite(decision, before))
        else:
            yield Skip(target, before, decision.reason)


def _evidence(captured: Captured) -> Evidence | None:
    """Return what calls of a model show; None, with a note, where nothing can be observed."""
    calls = captured.example_calls
    inputs = captured.example_inputs
    if not calls and inputs is not None:
        calls = (ExampleCall("example input", inputs),)
    if not calls:
        inferred = infer_inputs(captured.model, quick=True)
        if inferred.inputs is None:
            captured.notes.append(
                f"{inferred.missing}; so no stream was found: give an example input"
            )
            return None
        calls = (ExampleCall("an input that was made up", Inputs.of(inferred.inputs)),)
    try:
        evidence = observe(captured.model, calls)
    except CaptureError as error:
        if "refuses it" in str(error):
            raise
        captured.notes.append(str(error))
        return None
    captured.notes += [f"evidence: the calls {evidence.words}", *evidence.failed]
    return evidence
