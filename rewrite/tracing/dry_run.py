"""Run a call on the meta device, or with fake tensors, to learn shapes without computing values.

A module that cannot be traced is run as it is on the stand-in, and the inputs of every module that
it calls are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rewrite.runtime.quiet import quiet_fakes
from rewrite.runtime.stand_in import Attributes, stand_in
from rewrite.runtime.tree import Tree, join

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments and keywords of a call."""


class DryRun:
    """Runs functions, and modules of a model, on meta or fake tensors.

    Args:
        model: the model.
        copied: its stand-in, on the meta device.
        call: the example inputs of the model.

    Attributes:
        inputs: the inputs of each module's first call, by name, as far as one was recorded.
        running: whether a dry run is in progress.
        device: the device that the model is on.
    """

    def __init__(self, model: Tree, copied: Tree, call: Call) -> None:
        self.inputs: dict[str, Call] = {"": (on_meta(call[0]), on_meta(call[1]))}
        self.running = False
        self.device = next((t.device for t in model.model.parameters()), torch.device("cpu"))
        self._model = model
        self._copied = copied

    def run_function(self, function: Callable[..., Any], call: Call) -> Any:
        """Return what a function returns for a call."""
        return self._either(function, lambda mode: function, call)

    def run_module(self, name: str, call: Call, opaque: bool) -> Any:
        """Return what a module returns for a call; record the modules it calls if it is opaque.

        Raises:
            RuntimeError: it is compiled.
        """
        if isinstance(self._copied.get(name), torch.jit.ScriptModule):
            raise RuntimeError(f"{name} is compiled and is not run")
        return self._either(
            self._watched(name, self._copied, opaque),
            lambda mode: self._watched(name, self._fake(name, mode), opaque, inside=name),
            call,
        )

    def _either(
        self, meta: Callable[..., Any], fake: Callable[[Any], Callable[..., Any]], call: Call
    ) -> Any:
        """Call on the meta device, or with fake tensors where an operation lacks a meta kernel."""
        args, kwargs = tree_map(_argument_on_meta, call)
        try:
            with self._computing(), torch.device("meta"):
                return meta(*args, **kwargs)
        except Exception as error:
            if "meta tensors" in str(error):  # it asks for a number, which a fake has not either
                raise
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def faked(value: Any) -> Any:
            meta = isinstance(value, Tensor) and value.is_meta
            return FakeTensor(mode, value, self.device) if meta else value

        with self._computing(), quiet_fakes(), mode:
            args, kwargs = tree_map(faked, call)
            return on_meta(fake(mode)(*args, **kwargs))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        before = self.running
        self.running = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.running = before

    def _watched(self, name: str, tree: Tree, opaque: bool, inside: str = "") -> Callable[..., Any]:
        """Return a call of a module that restores it afterwards, and records what it calls."""
        module = tree.get("" if inside else name)
        if not opaque:
            return module

        def run(*args: Any, **kwargs: Any) -> Any:
            below = [m for m in module.modules() if m is not module and m in tree]
            before = Attributes(module.modules())
            handles = [
                m.register_forward_pre_hook(
                    self._note(join(inside, tree.name(m))), with_kwargs=True
                )
                for m in below
                if not isinstance(m, torch.jit.ScriptModule)
            ]
            try:
                return module(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
                before.put_back()

        return run

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.inputs.setdefault(name, (on_meta(args), on_meta(kwargs)))

        return hook

    def _fake(self, name: str, mode: Any) -> Tree:
        return Tree(stand_in(Tree(self._model.get(name)), mode.from_tensor, mode.from_tensor))


def on_meta(value: Any) -> Any:
    """Return `value` with every tensor in it on the meta device."""
    return tree_map(_tensor_on_meta, value)


def _tensor_on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor) or (type(value) in (Tensor, nn.Parameter) and value.is_meta):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _argument_on_meta(value: Any) -> Any:
    """Return an argument of a call on meta: tensors, and devices by name or object."""
    return torch.device("meta") if isinstance(value, torch.device) else _tensor_on_meta(value)
