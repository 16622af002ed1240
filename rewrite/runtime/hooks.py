"""Run a model with hooks on some of its modules, in eval mode, and take the hooks off again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.runtime.inputs import Inputs


@contextlib.contextmanager
def hooked(
    modules: Sequence[nn.Module], hook: Callable[[int, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `hook(index, input, output)` at each call of `modules`; what it returns goes on."""

    def hook_for(index: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda module, args, output: hook(index, args[0], output)

    handles = [
        module.register_forward_hook(hook_for(index), prepend=True)
        for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on one batch.

    Raises:
        OptionError: the model rejects it.
    """
    try:
        return model(*inputs.args, **inputs.kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        message = str(error).splitlines()[0]
        raise OptionError(
            f"calibration data ({inputs}): the model rejects it: {message}"
        ) from error
