"""Run `torch.cond` and `torch.while_loop` as plain Python, so that a recorder can look into them.

    cond(p, f, g, x)              = f(*x) if p else g(*x)
    while_loop(c, b, x, y)        = while c(*x, *y): x = b(*x, *y)

Called plainly, PyTorch compiles the call, which neither a function mode nor a dispatch mode gets
through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._higher_order_ops import utils


@contextlib.contextmanager
def branches_in_python() -> Iterator[None]:
    """Run branches and loops of the operators in Python while the context is open."""
    compiled: Callable[..., Any] = utils._hop_compile_and_call

    def plain(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if len(args) == 4 and isinstance(args[0], torch.Tensor) and callable(args[1]):
            chosen = args[1] if bool(args[0]) else args[2]
            return chosen(*args[3])
        if len(args) >= 3 and callable(args[0]) and callable(args[1]):
            return _loop(*args[:3], *args[3:4])
        return compiled(function, args, kwargs)

    utils._hop_compile_and_call = plain
    try:
        yield
    finally:
        utils._hop_compile_and_call = compiled


def _loop(
    condition: Callable[..., Any],
    body: Callable[..., Any],
    carried: tuple[Any, ...],
    others: tuple[Any, ...] = (),
) -> Any:
    while bool(condition(*carried, *others)):
        made = body(*carried, *others)
        carried = made if isinstance(made, tuple) else tuple(made)
    return carried
