"""Reference models for tests, examples and benchmarks. Not shipped in the wheel.

models.all_models()             name -> factory, in eval mode where the point is not another one
models.example_inputs(name)     the positional inputs that go with it
models.build(name)              both at once, every norm randomized, in float64
models.randomize_norms_(model)  for a model of your own
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models import blocks, control, norms, sharing, spelling, variants
from models.randomize import randomize_norms_, walk

__all__ = ["all_models", "build", "example_inputs", "randomize_norms_", "walk"]

# The dtype or the mode is what these models are about.
_KEEP_DTYPE = frozenset({"bfloat16", "half", "mixed_precision"})
_KEEP_MODE = frozenset({"train_mode", "train_mode_norm"})


def all_models() -> dict[str, Callable[[], nn.Module]]:
    """Return a factory for every awkward model, by snake-case name; each call builds it anew.

    A factory seeds its own random numbers, so that it returns the same weights every time.
    """
    factories = {_snake(cls.__name__): _factory(cls) for cls in _classes()}
    factories["graph_module_root"] = control.graph_module_root
    return {name: _seeded(name, factory) for name, factory in factories.items()}


def example_inputs(name: str) -> tuple[Any, ...]:
    """Return the positional inputs for a model of `all_models`, in its own dtype."""
    if name == "graph_module_root":
        return blocks.Residual.example_inputs()
    return {_snake(cls.__name__): cls for cls in _classes()}[name].example_inputs()


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a model with randomized norms and its inputs, both in `dtype`.

    The models whose point is their dtype keep it.
    """
    model = randomize_norms_(all_models()[name](), seed)
    inputs = example_inputs(name)
    if name in _KEEP_DTYPE:
        return model, inputs
    return model.to(dtype), _cast(inputs, dtype)


def _classes() -> tuple[type[Any], ...]:
    themes = (sharing, spelling, norms, control, blocks, variants)
    return tuple(cls for theme in themes for cls in theme.MODELS)


def _factory(cls: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: cls() if _snake(cls.__name__) in _KEEP_MODE else cls().eval()


def _seeded(name: str, factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build_model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(name.encode()))
            return factory()

    return build_model


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
