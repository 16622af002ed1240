"""Patch torch functions while a forward is traced, and restore the random generators afterwards."""

from __future__ import annotations

import contextlib
import dis
import functools
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.fx._symbolic_trace import _create_wrapped_func, _new_patcher
from torch.utils._device import _device_constructors

from rewrite.tracing.draws import refuse_draws
from rewrite.tracing.proxies import proxies_in
from rewrite.tracing.source_lines import asked_by_model

_CONTEXTS: tuple[Any, ...] = (
    torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode, torch.autocast,
)  # fmt: skip

_FACTORIES = (
    "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "eye", "linspace",
)  # fmt: skip


_ASKED = {
    "is_grad_enabled": "where gradients are computed, or are not",
    "is_inference_mode_enabled": "in inference mode, or out of it",
    "is_autocast_enabled": "under autocast, or without it",
    "is_autocast_cpu_enabled": "under autocast, or without it",
    "get_autocast_dtype": "under autocast, or without it",
}
"""What a forward may ask torch for, and when the answer is another one."""


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Patch torch for traces of a stand-in; on exit undo it and restore random generators."""
    numpy = sys.modules.get("numpy")
    states = torch.random.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        with _new_patcher() as patcher:
            _skip_dimension_checks(patcher)
            _record_factories(patcher)
            refuse_draws(patcher, model)
            _wrap_math(patcher)
            _disassemble_once(patcher)
            with _uncompiled():
                yield
    finally:
        torch.random.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])


def _disassemble_once(patcher: Any) -> None:
    """Keep the instructions of a function: torch.fx asks for them at each unpacking of a proxy."""

    @functools.lru_cache(maxsize=1024)
    def instructions(code: Any, **options: Any) -> tuple[dis.Instruction, ...]:
        return tuple(disassembled(code, **options))

    disassembled = dis.get_instructions
    patcher.patch(vars(dis), "get_instructions", instructions, deduplicate=False)


def _wrap_math(patcher: Any) -> None:
    """Record `math.sqrt(size)` as a call in the graph, once for all traces."""
    for name, function in list(vars(math).items()):
        if callable(function) and not name.startswith("_"):
            patcher.patch(vars(math), name, _create_wrapped_func(function))


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run functions wrapped by `torch.compile` as the code that was compiled.

    Compiled kernels read the memory of their inputs: a meta tensor crashes the process.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        return contextlib.nullcontext()
    stance: Any = torch.compiler.set_stance("force_eager")
    return cast("contextlib.AbstractContextManager[Any]", stance)


@contextlib.contextmanager
def contexts_entered() -> Iterator[list[str]]:
    """Collect the names of all context managers of torch that a forward enters."""
    entered: list[str] = []

    def noted(enter: Callable[..., Any]) -> Callable[..., Any]:
        def note(self: Any) -> Any:
            entered.append(type(self).__name__)
            return enter(self)

        return note

    with _new_patcher() as patcher:
        for kind in _CONTEXTS:
            patcher.patch_method(kind, "__enter__", noted(kind.__enter__), deduplicate=False)
        yield entered


def _skip_dimension_checks(patcher: Any) -> None:
    """Skip the dimension check of norms, which compares proxies: subclasses call it traced."""

    def skip(self: nn.Module, input: Any) -> None:
        return None

    from torch.nn.modules import batchnorm, instancenorm

    for module in (batchnorm, instancenorm):
        for kind in vars(module).values():
            if isinstance(kind, type) and "_check_input_dim" in vars(kind):
                patcher.patch_method(kind, "_check_input_dim", skip, deduplicate=False)


def _record_factories(patcher: Any) -> None:
    """Record `torch.zeros(n, c)` as a call in the graph where a size is a proxy."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            proxy = next(proxies_in((args, kwargs)), None)
            if proxy is None:
                return function(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", function, args, kwargs)

        return make

    # `with torch.device(...)` remembers the factories by identity at its first use, for good: it
    # has to meet the real ones.
    _device_constructors()
    for name in _FACTORIES:
        patcher.patch(vars(torch), name, recorded(getattr(torch, name)), deduplicate=False)


@contextlib.contextmanager
def modes_noted(note: Callable[[str], None]) -> Iterator[None]:
    """Call `note(condition)` whenever the model's code asks for a mode that may be another."""

    def noted(function: Callable[..., Any], when: str) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if asked_by_model(sys._getframe(1)):
                note(when)
            return function(*args, **kwargs)

        return ask

    with _new_patcher() as patcher:
        for name, when in _ASKED.items():
            function = getattr(torch, name)
            patcher.patch(vars(torch), name, noted(function, when), deduplicate=False)
        yield
