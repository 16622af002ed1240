"""Keep what torch's exporters warn and log to itself: an error says what matters, once."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let no warning and no log line through while the context is open.

    The loggers of torch's tracers are many and set their own levels: all are off meanwhile. A
    graph that they give up is printed, so standard error is too.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Let torch not log what fake tensors cannot do: who runs them hears it from the exception."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
