"""What example calls showed of a model: their graphs, and what could not be observed.

    observe(captured, calls)  ->  Evidence: one graph a call, and one more with all hidden states

Evidence holds for its calls. A call that cannot be exported leaves no graph, and a note.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from rewrite.errors import CaptureError
from rewrite.observe.calls import hidden_states_call, refusal_of, takes_hidden_states
from rewrite.observe.export import ObservedCall, export_call
from rewrite.observe.flow import Follower
from rewrite.runtime.inputs import ExampleCall


@dataclass(eq=False)
class Evidence:
    """The observed calls of one model.

    Attributes:
        calls: the graphs, one a call.
        wider: a call that returns more than the model's users ask for by default, if there is one.
        failed: per call that could not be observed, why.
    """

    calls: tuple[ObservedCall, ...]
    wider: ObservedCall | None = None
    failed: tuple[str, ...] = ()
    followers: dict[ObservedCall, Follower] = field(default_factory=dict)

    def follower(self, observed: ObservedCall) -> Follower:
        """Return what follows values through one call."""
        if observed not in self.followers:
            self.followers[observed] = Follower(observed)
        return self.followers[observed]

    @property
    def words(self) -> str:
        """Name the calls that the evidence rests on."""
        return ", ".join(observed.call.name for observed in self.calls)


def observe(model: nn.Module, calls: Sequence[ExampleCall]) -> Evidence:
    """Export every call of a model, which is neither changed nor run by that.

    Raises:
        CaptureError: the model refuses a call, or no call can be exported.
    """
    seen: list[ObservedCall] = []
    failed: list[str] = []
    for call in calls:
        try:
            seen.append(export_call(model, call))
        except CaptureError as error:
            if (refusal := refusal_of(model, call)) is not None:
                raise CaptureError(refusal) from error
            failed.append(str(error))
    if not seen:
        raise CaptureError(failed[0] if failed else "no example call is known: give example_calls")
    wider = None
    if takes_hidden_states(model):
        try:
            wider = export_call(model, hidden_states_call(seen[0].call))
        except CaptureError:
            failed.append("the call with output_hidden_states=True could not be observed")
    gc.collect()  # cycles hold the stand-ins of exports, and with them tensors that a fold replaces
    return Evidence(tuple(seen), wider, tuple(failed))
