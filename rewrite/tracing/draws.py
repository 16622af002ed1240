"""Detect values drawn outside the graph (random, time) that a trace would freeze as constants.

    y = x * (self.scale * np.random.rand())     random, numpy.random, time, uuid, os.urandom
    y = x + torch.rand(()).item()               the number of a tensor that was drawn
    y = x * self.rng.random()                   a generator that a module holds

Where the model's own code draws one during a trace, the trace of that forward fails, and sites in
it are declined with that line. A number that is the same at each call (`np.sqrt(64)`) is no draw.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import TraceError

from rewrite.runtime.tree import attributes_of
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


def refuse_draws(patcher: Any, model: nn.Module) -> None:
    """Make drawing functions raise while the model's code is traced, until `patcher` undoes it.

    Args:
        patcher: the patcher of `torch.fx`.
        model: a stand-in; generators in its attributes and in the globals of its code are
            replaced as well.
    """
    modules: dict[str, ModuleType] = {"random": random, "time": time, "uuid": uuid, "os": os}
    if (numpy := sys.modules.get("numpy.random")) is not None:
        modules["numpy.random"] = numpy
    ended: dict[int, Callable[..., Any]] = {}
    for place, module in modules.items():
        for name in _NAMES[place]:
            if hasattr(module, name):
                function = getattr(module, name)
                ended[id(function)] = _ended(function, f"{place}.{name}")
    for names in (*map(vars, modules.values()), *_named_by(model)):
        for name, value in list(names.items()):
            if (end := ended.get(id(value))) is not None:
                patcher.patch(names, name, end, deduplicate=False)
    generators = _hold_generators(patcher, model, numpy)
    before = [(generator, generator.get_state()) for generator in generators]
    for name in _NUMBERS:
        asked = _of_drawn(getattr(torch.Tensor, name), before)
        patcher.patch_method(torch.Tensor, name, asked, deduplicate=False)


def _named_by(model: nn.Module) -> list[dict[str, Any]]:
    """Return the namespaces that the model's code looks names up in: its files' globals."""
    kinds = {kind for own in {type(module) for module in model.modules()} for kind in own.__mro__}
    files = {kind.__module__ for kind in kinds if not kind.__module__.startswith("torch.")}
    found = {
        id(vars(sys.modules[name])): vars(sys.modules[name]) for name in files & {*sys.modules}
    }
    for names in list(found.values()):
        for value in names.values():
            if isinstance(value, FunctionType) and not value.__module__.startswith("torch"):
                found.setdefault(id(value.__globals__), value.__globals__)
    return list(found.values())


def _hold_generators(
    patcher: Any, model: nn.Module, numpy: ModuleType | None
) -> list[torch.Generator]:
    """Replace generators in attributes of modules; return torch's own, which stay."""
    kinds: tuple[type, ...] = (random.Random,)
    if numpy is not None:
        kinds += (numpy.Generator, numpy.RandomState)
    found = [torch.default_generator]
    for module in model.modules():
        own = dict(attributes_of(module))
        dicts = [value for value in own.values() if isinstance(value, dict)]
        for held, items in ((vars(module), own), *((held, dict(held)) for held in dicts)):
            for key, value in items.items():
                if isinstance(value, torch.Generator):
                    found.append(value)
                elif isinstance(value, kinds):
                    patcher.patch(held, key, _Held(key), deduplicate=False)
    return found


class _Held:
    """The replacement of a random generator while a forward is traced: drawing raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        raise TraceError(f"calls {self._name}.{method}, which gives another value at each call")


def _ended(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        if asked_by_model(sys._getframe(1)):
            raise TraceError(f"calls {name}, which gives another value at each call")
        return function(*args, **kwargs)

    return draw


def _of_drawn(
    method: Callable[..., Any], before: list[tuple[torch.Generator, torch.Tensor]]
) -> Callable[..., Any]:
    def number(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if asked_by_model(sys._getframe(1)) and not all(
            torch.equal(generator.get_state(), state) for generator, state in before
        ):
            raise TraceError("needs a random number of torch, which is another one at each call")
        return method(self, *args, **kwargs)

    return number
