"""Models by name: `package.module:factory`, `torchvision:NAME`, `timm:NAME`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rewrite.checkpoint.closest import closest_model
from rewrite.errors import CheckpointError
from rewrite.runtime.inputs import seeded
from rewrite.text.suggest import how_to_install

FACTORY_NAME = re.compile(
    r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)(?P<kwargs>\(.*\))?", re.S
)


def build_named(reference: str, seed: int | None = None) -> nn.Module:
    """Return the eval-mode model that a name or a factory stands for, drawn from `seed`.

    Raises:
        CheckpointError: there is no such factory, it raises, or it returns no module.
    """
    match = FACTORY_NAME.fullmatch(reference)
    if match is None:
        raise CheckpointError(f"{reference}: is no factory; write package.module:callable")
    kwargs = _kwargs(reference, match["kwargs"])
    try:
        with contextlib.nullcontext() if seed is None else seeded(seed):
            model = _call(match["module"], match["name"], kwargs)
    except CheckpointError as error:
        raise CheckpointError(f"{reference}: {error}") from error
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        hint = how_to_install(error) or closest_model(match["module"], match["name"])
        raise CheckpointError(
            f"{reference}: raised {type(error).__name__}: {message}{hint}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{reference}: returned a {type(model).__name__}, not an nn.Module")
    return model.eval()


def _kwargs(reference: str, text: str | None) -> dict[str, Any]:
    """Parse the `({...})` of a factory."""
    inner = (text or "()")[1:-1].strip()
    try:
        kwargs = json.loads(inner or "{}")
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{reference}: the arguments are no JSON ({error})") from error
    if not isinstance(kwargs, dict):
        raise CheckpointError(
            f'{reference}: the arguments must be an object, as in ({{"width": 8}})'
        )
    return kwargs


def _call(module: str, name: str, kwargs: dict[str, Any]) -> Any:
    """Call the builder that a name stands for."""
    if module == "torchvision":
        return _torchvision(name, kwargs)
    if module == "timm":
        import timm

        return timm.create_model(name, **{"pretrained": False, **kwargs})
    try:
        with current_folder_importable():
            value: Any = importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(f"cannot import {module} ({error})") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise CheckpointError(f"{module} has no {name}")
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise CheckpointError(f"is a {type(value).__name__}, not a callable")
    return value(**kwargs)


@contextlib.contextmanager
def current_folder_importable() -> Iterator[None]:
    """Find what the user names in the folder where the user stands, as `python -m` does."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _torchvision(name: str, kwargs: dict[str, Any]) -> Any:
    """Build a torchvision model without downloading weights, those of its backbone neither."""
    from torchvision import models

    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    fresh = {key: None for key in ("weights", "weights_backbone") if key in known}
    return builder(**{**fresh, **kwargs})
