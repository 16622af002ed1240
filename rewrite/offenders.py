"""Find the sites that break a contract: those that are suspected, else by bisection.

    broken(S)       the contract does not hold when the sites of S are rewritten, and no others
    offenders(S)    {s}                                if S = {s}
                    offenders(L) + offenders(R)        over the broken halves L, R of S
                    R                                  if neither is broken: they break it together

One offender among n costs about 2 log2(n) trials. Trials are bounded, for each rewrites and runs
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

TRIALS = 40
"""At most so many rewritten models are tried before a search is given up."""


class _OutOfTrialsError(Exception):
    """The bound on trials was reached."""


def offenders(sites: Sequence[str], broken: Callable[[Sequence[str]], str]) -> dict[str, str]:
    """Return the sites that have to be left out, each with the reason; nothing if none was found.

    Args:
        sites: the sites that are broken together, in their order.
        broken: rewrites the given sites alone, and returns why the contract does not hold, or "".
    """
    left = TRIALS

    def search(some: Sequence[str], reason: str) -> dict[str, str]:
        nonlocal left
        if len(some) == 1:
            return {some[0]: reason}
        half = len(some) // 2
        found: dict[str, str] = {}
        for part in (some[:half], some[half:]):
            if not left:
                raise _OutOfTrialsError
            left -= 1
            if why := broken(part):
                found |= search(part, why)
        return found or dict.fromkeys(some[half:], reason)

    try:
        return search(sites, "the contract does not hold with it")
    except _OutOfTrialsError:
        return {}
