"""Run a model in eval mode or in another dtype, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from rewrite.runtime.tree import Tree

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def widen(value: Any) -> Any:
    """Return `value` with every narrow floating-point tensor in it as float64, on its device."""
    return tree_map(_widen_tensor, value)


def _widen_tensor(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dtype not in WIDE:
        return value
    # MPS has no float64: judge on the CPU what only the CPU can represent.
    device = torch.device("cpu") if value.device.type == "mps" else value.device
    return value.to(device=device, dtype=WIDE[value.dtype])


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Give `model` its own buffers while the context is open, so that a forward leaves no trace."""
    exchange = ModuleExchange(model)
    exchange.own_buffers()
    try:
        yield
    finally:
        exchange.restore()


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, each module back into its own mode afterwards.

    Modules that stand in plain lists and dicts, which `model.eval()` does not reach, go with them.
    """
    hidden = [module for model in models for _, module in Tree(model).modules()]
    seen = [*(module for model in models for module in model.modules()), *hidden]
    before = {module: module.training for module in seen}
    try:
        for model in models:
            try:
                model.eval()
            except NotImplementedError:  # the module of an exported program forbids it
                for module in model.modules():
                    module.training = False
        for module in hidden:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


class ModuleExchange:
    """The tensors of a model, replaced by float64 ones, and everything back afterwards.

    Args:
        model: any model.
        exact: what parameters and buffers are in float64 before they are rounded, by their first
            qualified names: taken in place of what the model holds.
    """

    def __init__(
        self, model: nn.Module, exact: Mapping[str, Callable[[], torch.Tensor]] | None = None
    ) -> None:
        self.modules = dict(Tree(model).modules())
        self._exact: dict[int, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
        for name, value in (exact or {}).items():
            owner, _, attr = name.rpartition(".")
            module = self.modules[owner]
            tensor = module._parameters.get(attr, module._buffers.get(attr))
            assert tensor is not None
            self._exact[id(tensor)] = (tensor, value)
        self._state = {
            name: (dict(vars(module)), dict(module._parameters), dict(module._buffers))
            for name, module in self.modules.items()
        }
        self._hooks = {name: _hooks_of(module) for name, module in self.modules.items()}
        self._memo: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def own_buffers(self) -> None:
        """Exchange every buffer for a private copy of the same type."""
        for module in self.modules.values():
            module._buffers.update(
                {key: self._converted(b, _clone) for key, b in module._buffers.items()}
            )
        for held, value in list(self._exact.values()):
            if id(held) in self._memo:
                clone = self._memo[id(held)][1]
                self._exact[id(clone)] = (clone, value)
        self._memo.clear()

    def widen(self, name: str) -> None:
        """Exchange the tensors of one module for wide ones."""
        module = self.modules[name]
        module._parameters.update(
            {key: self._converted(p, self._wide) for key, p in module._parameters.items()}
        )
        module._buffers.update(
            {key: self._converted(b, self._wide) for key, b in module._buffers.items()}
        )
        held = vars(module)
        for key, value in self._state[name][0].items():
            if isinstance(value, torch.Tensor):
                held[key] = self._converted(value, self._wide)
            elif _is_tensor_list(value):
                held[key] = [self._converted(item, self._wide) for item in value]

    def _wide(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor in float64: as it is stored, or as it was before it was rounded."""
        if id(value) not in self._exact:
            return _wide(value)
        exact = cast(torch.Tensor, _widen_tensor(self._exact[id(value)][1]()))
        if isinstance(value, nn.Parameter):
            return nn.Parameter(exact, requires_grad=value.requires_grad)
        return exact

    def drop(self, name: str) -> None:
        """Put the narrow parameters of one module back; buffers keep what the forward wrote."""
        held, parameters, _ = self._state[name]
        module = self.modules[name]
        module._parameters.update(parameters)
        for key, value in held.items():
            if isinstance(value, torch.Tensor) or _is_tensor_list(value):
                vars(module)[key] = value
        self._memo.clear()

    def restore(self) -> None:
        """Put every tensor and every attribute back, and take away the hooks that came since.

        A forward that registers hooks notes in an attribute that it did (transformers, for hidden
        states): the one without the other, and each next call would register them again.
        """
        for name, (held, parameters, buffers) in self._state.items():
            module = self.modules[name]
            for live, saved in (
                (vars(module), held),
                (cast(dict[str, Any], module._parameters), parameters),
                (cast(dict[str, Any], module._buffers), buffers),
            ):
                live.clear()
                live.update(saved)
            for hooks, known in self._hooks[name]:
                for key in hooks.keys() - known:
                    del hooks[key]

    def _converted(self, value: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Return `value` converted, the same result for the same tensor: ties stay ties."""
        if type(value) not in (torch.Tensor, nn.Parameter):
            return value
        if id(value) not in self._memo:
            result = convert(value)
            # Kept with its source, whose id may not go to another tensor meanwhile. The result is
            # an attribute now and may be met again: it stands for itself.
            self._memo[id(value)] = (value, result)
            self._memo[id(result)] = (result, result)
        return self._memo[id(value)][1]


def _hooks_of(module: nn.Module) -> list[tuple[dict[int, Any], frozenset[int]]]:
    """Return the registries of a module's hooks, and the keys that each holds now."""
    held = (value for key, value in vars(module).items() if key.endswith("hooks"))
    return [(hooks, frozenset(hooks)) for hooks in held if isinstance(hooks, dict)]


def _clone(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone()


def _wide(value: torch.Tensor) -> torch.Tensor:
    if value.dtype not in WIDE:
        return value
    wide = cast(torch.Tensor, _widen_tensor(value.detach()))
    if isinstance(value, nn.Parameter):
        return nn.Parameter(wide, requires_grad=value.requires_grad)
    return wide


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value)
