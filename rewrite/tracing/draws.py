"""Numbers that are made anew at each call, outside of the graph: a trace would keep the first one.

    y = x * (self.scale * np.random.rand())     random, numpy.random, time, uuid, os.urandom
    y = x + torch.rand(()).item()               the number of a tensor that was drawn

Where the model's own code asks for one while it is traced, the trace of that forward ends: what is
in it is declined, with the line. A number that is the same at each call (`np.sqrt(64)`) is none.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.fx.proxy import TraceError

from rewrite.tracing.source_lines import asked_by_model

_NAMES: dict[str, tuple[str, ...]] = {
    "random": ("random", "uniform", "randint", "randrange", "choice", "choices", "sample", "gauss",
               "shuffle", "normalvariate", "betavariate", "expovariate", "getrandbits"),
    "numpy.random": ("rand", "randn", "random", "random_sample", "randint", "uniform", "normal",
                     "standard_normal", "choice", "permutation", "shuffle", "beta", "binomial",
                     "poisson", "exponential", "gamma", "default_rng"),
    "time": ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns",
             "process_time"),
    "uuid": ("uuid1", "uuid4"),
    "os": ("urandom",),
}  # fmt: skip

_NUMBERS = ("item", "tolist", "__bool__", "__float__", "__int__")


def refuse_draws(patcher: Any) -> None:
    """End a trace where the model's code draws a number, until `patcher` puts back what was there.

    Args:
        patcher: of `torch.fx`.
    """
    modules: dict[str, ModuleType] = {"random": random, "time": time, "uuid": uuid, "os": os}
    if (numpy := sys.modules.get("numpy.random")) is not None:
        modules["numpy.random"] = numpy
    for place, module in modules.items():
        for name in _NAMES[place]:
            if hasattr(module, name):
                ended = _ended(getattr(module, name), f"{place}.{name}")
                patcher.patch(vars(module), name, ended, deduplicate=False)
    before = torch.random.get_rng_state()
    for name in _NUMBERS:
        asked = _of_drawn(getattr(torch.Tensor, name), before)
        patcher.patch_method(torch.Tensor, name, asked, deduplicate=False)


def _ended(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        if asked_by_model(sys._getframe(1)):
            raise TraceError(f"calls {name}, which gives another value at each call")
        return function(*args, **kwargs)

    return draw


def _of_drawn(method: Callable[..., Any], before: torch.Tensor) -> Callable[..., Any]:
    def number(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if asked_by_model(sys._getframe(1)) and not torch.equal(
            torch.random.get_rng_state(), before
        ):
            raise TraceError("needs a random number of torch, which is another one at each call")
        return method(self, *args, **kwargs)

    return number
