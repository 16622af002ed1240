"""Functions that hold a module of a model, bound to the module of a copy instead.

`copy.deepcopy` takes a function for a constant. A hook that names its model (by a cell of its
closure, a default, or a global variable) would go on to read and write the original.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_PLAIN = frozenset({type(None), bool, int, float, str, type, Tensor})
"""What holds no function."""

_DICTS = frozenset({dict, OrderedDict})

_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})

_DEPTH = 4
"""How far a function is followed through containers, partials and other functions."""


def functions_of(attributes: Iterable[tuple[str, Any]]) -> Iterator[FunctionType]:
    """Yield the functions among the hooks and attributes of a module, those in containers too."""
    for key, value in attributes:
        kind = type(value)
        if (kind not in _DICTS or value) and kind not in _PLAIN and key not in _REGISTERED:
            yield from _functions_in(value)


def rebound(
    function: FunctionType, is_copied: Callable[[Any], bool]
) -> tuple[FunctionType, Callable[[Callable[[Any], Any]], None]] | None:
    """Return `function` over copies of the modules that it holds, and what puts them in.

    The new function exists before the copies do, which may hold it themselves; it may be called
    once the second value was called with what returns the copy of a value.

    Args:
        function: any Python function.
        is_copied: whether a value, a module or a tensor, is one that is copied.

    Returns:
        None for a function that holds nothing that is copied.
    """
    made, fill = _over(function, is_copied)
    scope = function.__globals__
    names = [n for n in _globals_of(function) if _is_module(scope[n]) and is_copied(scope[n])]
    copies: dict[str, Any] = {}
    if names:
        made = _naming(made, copies)
    if made is function:
        return None

    def put_in(copied: Callable[[Any], Any]) -> None:
        fill(copied)
        copies.update({name: copied(scope[name]) for name in names})

    return made, put_in


def _over(
    function: FunctionType, is_copied: Callable[[Any], bool]
) -> tuple[FunctionType, Callable[[Callable[[Any], Any]], None]]:
    """Return `function` with cells and defaults of its own where they hold what is copied.

    The other cells stay those of the program: what a hook collects is found where it was.
    """
    cells = function.__closure__ or ()
    defaults, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
    fresh = {index: CellType() for index, c in enumerate(cells) if _holds(_content(c), is_copied)}
    if not fresh and not any(_holds(v, is_copied) for v in (*defaults, *keywords.values())):
        return function, lambda copied: None
    closure = tuple(fresh.get(index, cell) for index, cell in enumerate(cells))
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, closure or None
    )
    made.__dict__.update(function.__dict__)
    made.__qualname__ = function.__qualname__

    def fill(copied: Callable[[Any], Any]) -> None:
        def own(value: Any) -> Any:
            return copied(value) if _holds(value, is_copied) else value

        for index, cell in fresh.items():
            cell.cell_contents = copied(cells[index].cell_contents)
        made.__defaults__ = tuple(map(own, defaults)) or None
        made.__kwdefaults__ = {key: own(value) for key, value in keywords.items()} or None

    return made, fill


def _naming(function: FunctionType, copies: dict[str, Any]) -> FunctionType:
    """Return `function`, run while its global names of modules stand for the copies.

    Its other globals stay those of the program, to be read and written.
    """
    scope = function.__globals__

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = {name: scope[name] for name in copies}
        scope.update(copies)
        try:
            return function(*args, **kwargs)
        finally:
            scope.update({k: v for k, v in before.items() if scope.get(k) is copies[k]})

    assert isinstance(run, FunctionType)
    return run


def _globals_of(function: FunctionType, depth: int = 0) -> Iterator[str]:
    """Yield the global names that a function reads, and those that functions beside it read."""
    scope = function.__globals__
    for name in dict.fromkeys(_names(function.__code__)):
        if name in scope:
            yield name
            value = scope[name]
            beside = isinstance(value, FunctionType) and value.__globals__ is scope
            if beside and value is not function and depth < _DEPTH:
                yield from _globals_of(value, depth + 1)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


_EMPTY = object()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _holds(value: Any, is_copied: Callable[[Any], bool], depth: int = 0) -> bool:
    """Return whether a value is a module or tensor that is copied, or leads to one."""
    if isinstance(value, nn.Module | Tensor):
        return is_copied(value)
    if depth == _DEPTH:
        return False
    held = list(_parts(value))
    if isinstance(value, FunctionType):
        scope = value.__globals__
        held = [_content(cell) for cell in value.__closure__ or ()]
        held += [scope[name] for name in _globals_of(value) if _is_module(scope[name])]
    return any(_holds(item, is_copied, depth + 1) for item in held)


def _functions_in(value: Any, depth: int = 0) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        yield value
        for cell in value.__closure__ or ():
            if depth < _DEPTH:
                yield from _functions_in(_content(cell), depth + 1)
    elif depth < _DEPTH:
        for item in _parts(value):
            yield from _functions_in(item, depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a container, a partial or a bound method holds."""
    if type(value) in (dict, OrderedDict):
        yield from value.values()
    elif type(value) in (list, tuple, deque):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
