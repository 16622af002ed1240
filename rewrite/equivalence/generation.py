"""Compare sixteen steps of greedy decoding: whether differences in logits change tokens.

token[n+1] = argmax f(token[1..n])      in float64, without a cache
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.equivalence.verification import Case
from rewrite.errors import one_line
from rewrite.runtime.float64 import in_float64, short_of_memory
from rewrite.runtime.inputs import Inputs, call
from rewrite.runtime.modes import widen

if TYPE_CHECKING:
    from rewrite.equivalence.equality import Findings

_TOKENS = 16
_KEYS = ("decoder_input_ids", "input_ids")


def compare_generation(
    a: nn.Module, b: nn.Module, given: list[tuple[str, Inputs]], found: Findings
) -> None:
    """Add to `found` whether both models generate the same tokens, if they generate any."""
    start = next((inputs for _, inputs in given if generates(a, inputs)), None)
    if start is None or found.reasons:
        return
    wide = start.map(widen)
    name = f"{_TOKENS} greedy tokens"
    with in_float64(a, b, streamed=short_of_memory(a, b)):
        try:
            expected = greedy_tokens(a, wide)
        except Exception as error:  # noqa: BLE001 - a longer input may be one too long
            why = f"the original refuses it: {one_line(error)}"
            found.cases.append(Case(name, str(start), skipped=why))
            return
        try:
            same = greedy_tokens(b, wide) == expected
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            found.fail(name, start, f"the rewritten model fails: {one_line(error)}")
            return
    found.cases.append(Case(name, str(start), failed=not same))
    if not same:
        found.reasons.append(f"{name} differ")


def generates(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether a model can generate, and the inputs are token ids without a cache."""
    says = getattr(model, "can_generate", None)
    known = callable(says) and bool(says())
    others = {"attention_mask", "past_key_values", "cache", "cache_params"}
    return known and bool(inputs.kwargs.keys() & set(_KEYS)) and not inputs.kwargs.keys() & others


def greedy_tokens(model: nn.Module, inputs: Inputs, count: int = _TOKENS) -> list[list[int]]:
    """Return the next `count` greedy tokens after the given ones, one list per sample."""
    kwargs: dict[str, Any] = dict(inputs.kwargs)
    key = next(k for k in _KEYS if k in kwargs)
    start = kwargs[key].shape[1]
    for _ in range(count):
        output = call(model, Inputs(inputs.args, kwargs).clone())
        chosen = output.logits[:, -1].argmax(-1, keepdim=True)
        kwargs[key] = torch.cat([kwargs[key], chosen], dim=1)
    tokens: list[list[int]] = kwargs[key][:, start:].tolist()
    return tokens
