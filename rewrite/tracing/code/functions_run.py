"""The functions that a trace runs, and the modules of the model that their names hold.

    getattr(tools, name)(self, x)      globals()[name](self, x)      partial(f, self)(x)
    a decorator's wrapper, a function of a closure, a descriptor, a lambda over `self.blocks`

How code spells such a call says little of what runs. The trace runs it: each function is noted when
it begins and when it ends, with every local name that stands for a module of the model, or for a
container or an object that holds some. Its source is analyzed for what it does with them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.fx import Proxy

from rewrite.runtime.tree import Tree
from rewrite.tracing.code.class_code import ClassCode, ModuleUse, code_given, code_of
from rewrite.tracing.source_lines import asked_by_model

Step = str | None
"""Where in a container or an object a module is: a key or attribute; None for the value itself."""

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type, Tensor})

_GENERATED = "<eval_with_key>"
"""The file of forwards that were made from a graph: what they read is in it."""

_PARTS = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"})
"""Code that is part of the function around it."""

_MANY = 64
"""How many items of a container are looked at."""


@dataclass(frozen=True)
class Ran:
    """A function that a trace ran.

    Attributes:
        code: the function.
        file: its file: equal code may stand in two.
        scope: its globals.
    """

    code: CodeType
    file: str
    scope: dict[str, Any] = field(compare=False)


HeldModules = dict[tuple[Ran, str], dict[tuple[str, Step], None]]
"""Per function and local name: the modules, by name, each with where it is in the value."""


class FunctionsRun:
    """What traces have run so far.

    Args:
        tree: the modules that are traced.

    Attributes:
        held: the modules that each function had.
        callers: per function, the line that called it first.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._followed: dict[int, tuple[CodeType, bool]] = {}  # by identity: a code's hash is slow
        self._read: dict[type, frozenset[CodeType]] = {}
        self.held: HeldModules = {}
        self.callers: dict[Ran, str] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note every function of the model's own code that begins or ends in this context."""
        before = sys.gettrace()
        sys.settrace(self._begins)
        try:
            yield
        finally:
            sys.settrace(before)

    def uses(self) -> Iterator[tuple[str, ClassCode]]:
        """Yield what each function did with each module that it had, by the module's name.

        Paths are below that module. What has no source is assumed to read all tensors.
        """
        for (ran, name), places in self.held.items():
            code = code_given(_function_of(ran), ((name, ()),))
            for module, step in places:
                if code is None:
                    text = f"{ran.code.co_name}, of which the source is not known,"
                    yield module, ClassCode(tensors=[ModuleUse((), text, self.callers[ran])])
                else:
                    yield module, code if step is None else _of_item(code, step)

    def _begins(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        held = self._followed.get(id(code))
        if held is None:
            held = self._followed[id(code)] = (code, _is_followed(frame))
        if not held[1]:
            return None
        frame.f_trace_lines = False
        self._note(frame)
        return self._ends

    def _ends(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "return":
            self._note(frame)
        return self._ends

    def _note(self, frame: FrameType) -> None:
        outer = frame
        while outer.f_code.co_name in _PARTS and outer.f_back is not None:
            outer = outer.f_back
        code = outer.f_code
        ran = Ran(code, code.co_filename, outer.f_globals)
        for name, value in frame.f_locals.items():
            if type(value) in _PLAIN or name == "__class__":
                continue
            for step, module in _modules_in(value):
                if module not in self._tree or self._is_own(code, name, step, module):
                    continue
                self.held.setdefault((ran, name), {})[self._tree.name(module), step] = None
                if ran not in self.callers:
                    self.callers[ran] = _line(outer.f_back)

    def _is_own(self, code: CodeType, name: str, step: Step, module: nn.Module) -> bool:
        """Return whether a function is one that the analysis of its `self`'s class has read."""
        if step is not None or code.co_varnames[:1] != (name,):
            return False
        kind = type(module)
        if kind not in self._read:
            self._read[kind] = frozenset(code_of(kind).functions)
        return code in self._read[kind]


def _of_item(code: ClassCode, step: str) -> ClassCode:
    """Return the part of an analysis that is about one item of a container or an object."""
    found = ClassCode()
    for kind in ("tests", "reads", "tensors", "choices", "assigned", "moved"):
        below = [
            replace(use, path=use.path[1:])
            for use in getattr(code, kind)
            if use.path and use.path[0] in (None, step)
        ]
        of_the_item = kind in ("tests", "tensors", "choices")  # else of the container itself
        setattr(found, kind, [use for use in below if use.path or of_the_item])
    return found


Method = TypeVar("Method", bound=Callable[..., Any])


def unnoted(method: Method) -> Method:
    """Leave out what a method of the tracer runs: its own work is long, and no code of a model."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        noting = sys.gettrace()
        sys.settrace(None)
        try:
            return method(*args, **kwargs)
        finally:
            sys.settrace(noting)

    return cast(Method, run)


@functools.lru_cache(maxsize=4096)
def _function_of(ran: Ran) -> FunctionType:
    """Return a function to be read, not to be called: its cells are empty."""
    cells = tuple(CellType() for _ in ran.code.co_freevars)
    return FunctionType(ran.code, ran.scope, closure=cells or None)


def _is_followed(frame: FrameType) -> bool:
    """Return whether a function is of the model's own code, or of a library that models use."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    generated = frame.f_code.co_filename.startswith(_GENERATED)
    other = package in ("rewrite", "transformers")
    return not other and not generated and asked_by_model(frame)


def _modules_in(value: Any) -> Iterator[tuple[Step, nn.Module]]:
    """Yield the modules that a value is, or holds, each with where it is."""
    if isinstance(value, nn.Module):
        yield None, value
        return
    if isinstance(value, list | tuple):
        items: Iterable[tuple[Any, Any]] = enumerate(value[:_MANY])
    elif isinstance(value, dict):
        items = list(value.items())[:_MANY]
    elif isinstance(value, Proxy | ModuleType):
        return
    else:
        held = getattr(value, "__dict__", None)
        items = list(held.items())[:_MANY] if isinstance(held, dict) else ()
    for key, item in items:
        if isinstance(item, nn.Module):
            yield str(key), item


def _line(frame: FrameType | None) -> str:
    """Return "file.py:123", the line of the model's code that runs in a frame or around it."""
    while frame is not None and not asked_by_model(frame):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
