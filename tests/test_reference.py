"""The reference: every public name stands in docs/api.md and says what it takes and raises."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import passes
import rewrite
import rewrite.graph
import rewrite.training

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
NAMED = set(re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), re.M))
FACES: tuple[Any, ...] = (rewrite, rewrite.training, rewrite.graph, passes)


def public() -> Iterator[tuple[str, Any]]:
    for face in FACES:
        for name in face.__all__:
            value = getattr(face, name)
            if not isinstance(value, ModuleType):
                yield f"{face.__name__}.{name}", value


PUBLIC = dict(public())


def undocumented(function: Any) -> list[str]:
    """Return the parameters that a function's docstring does not name."""
    text = inspect.getdoc(function) or ""
    taken = inspect.signature(function).parameters
    return [name for name in taken if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    value = PUBLIC[name]
    places = {value.__module__, f"{value.__module__}.{value.__name__}"}
    assert places & NAMED, f"docs/api.md lacks ::: {value.__module__}.{value.__name__}"


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if inspect.isfunction(v)))
def test_every_function_says_what_it_takes(name: str) -> None:
    # `captured` and `node` of the readers of one node are what their types say.
    left = set(undocumented(PUBLIC[name])) - {"captured", "node"}
    assert left == set()


def test_a_parameter_without_a_word_is_found() -> None:
    def blurred(radius: float, sigma: float) -> None:
        """Blur by `radius`."""

    assert undocumented(blurred) == ["sigma"]


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if inspect.isclass(v)))
def test_every_class_and_each_of_its_methods_has_a_docstring(name: str) -> None:
    value = PUBLIC[name]
    assert value.__doc__
    for key, member in vars(value).items():
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            # A method that fulfils a protocol has the docstring of the one that it overrides.
            assert inspect.getdoc(getattr(value, key)), f"{name}.{key}"


def test_the_reference_names_nothing_that_is_gone() -> None:
    for name in NAMED:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name
