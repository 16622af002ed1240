"""Branches that a trace did not take: code that runs for other values of optional arguments.

    def forward(self, x, raw=False):
        if raw:                          # a choice: other code may read values of this forward,
            return self.block.conv(x)    # and call the modules that it mentions
        return self.block(x)

A trace takes every optional argument at its default, and assumes that every other one is given. The
analysis here works on the source instead: it starts at the forward of a region's root and follows
optional arguments, and values computed from them, into each method, module and function that gets
them. It follows names, not values, so it finds everything that may run. The result of a call counts
as a new value: a mask of an attention, which is added to scores, does not taint its input.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Set
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.runtime.tree import Tree
from rewrite.tracing.code.branch_effects import (
    UNKNOWN,
    BranchEffects,
    Line,
    line_of,
    spell,
    until,
)
from rewrite.tracing.code.source import source_of
from rewrite.tracing.decisions import place_of, statement_at, uncertain_values
from rewrite.tracing.regions import Region
from rewrite.tracing.taint import TaintAnalysis, is_super, path_of

_Readers = dict[tuple[Any, frozenset[str], frozenset[str]], TaintAnalysis | None]

_SIZES = frozenset({"shape", "size", "ndim", "dim", "numel", "dtype", "device"})
"""What is asked of a value without reading it."""


class UntracedBranches:
    """The branches of a captured model that its trace did not take, analyzed at first use."""

    def __init__(self, tree: Tree, regions: tuple[Region, ...]) -> None:
        self._tree = tree
        self._regions = regions
        self._readers: _Readers = {}

    @cached_property
    def _choices(self) -> dict[str, dict[str, BranchEffects]]:
        """The effects by region, and by the name of the module whose code branches."""
        found: dict[str, dict[str, BranchEffects]] = {}
        for region in self._regions:
            search = _Search(self._tree, region.entered, self._readers)
            forward = getattr(type(self._tree.get(region.name)), "forward", None)
            if inspect.isfunction(forward):
                free = frozenset(region.assumed)
                given = _parameters(forward) - free
                search.function(region.name, forward, free, given)
                search.by_none(region.name, forward, free)
            found[region.name] = search.found
        return found

    @cached_property
    def _by_size(self) -> dict[str, dict[str, BranchEffects]]:
        """The effects of other input sizes by region, and by the name of the module."""
        trees: dict[CodeType, ast.Module | None] = {}
        found: dict[str, dict[str, BranchEffects]] = {}
        for region in self._regions:
            effects = found.setdefault(region.name, {})
            for decision in region.decisions:
                does = effects.setdefault(decision.owner, BranchEffects({}, set(), set()))
                does.sizes[place_of(decision)] = decision.when
                statement = statement_at(decision.code, decision.line, trees)
                if statement is None:
                    does.anything = True
                    continue
                spell(statement, does)
                children = self._tree.get(decision.owner)._modules
                does.anything |= any(
                    _calls_other_code(node, children, decision.code) for node in ast.walk(statement)
                )
        return found

    @cached_property
    def _uncertain(self) -> dict[str, dict[Node, str]]:
        return {region.name: uncertain_values(region.decisions) for region in self._regions}

    @cached_property
    def _repeated(self) -> dict[str, set[str]]:
        """The modules whose forward ran more than once, by region."""
        found: dict[str, set[str]] = {}
        for region in self._regions:
            runs = Counter(frame.owner for frame in set(region.frames.values()))
            found[region.name] = {owner for owner, times in runs.items() if times > 1}
        return found

    def caller(self, place: str) -> str | None:
        """Return, in words, what may call the module at `place` in code that did not run."""
        for region in (*self._choices.values(), *self._by_size.values()):
            for owner in _around(place, region):
                below = place[len(owner) :].lstrip(".")
                does = region[owner]
                if below and does.may_call(below):
                    where = owner or "the model"
                    return f"the forward of {where} may call {place} {does.words}"
        return None

    def reader(self, region: Region, node: Node) -> str | None:
        """Return, in words, what else may read `node` in code that did not run."""
        if (line := self._uncertain[region.name].get(node)) is not None:
            return f"the code at {line}"
        if not (found := self._choices[region.name]):
            return None
        made = region.frames[node].owner
        line = region.lines.get(node)
        own = found.get(made)
        over = own is not None and line is not None and own.is_over(*line)
        for user in node.users:
            read = region.frames[user].owner if user in region.frames else made
            for owner in dict.fromkeys((*_around(made, found), *_around(read, found))):
                does = found[owner]
                enters = not is_within(made, owner) and is_within(read, owner)
                if (over and owner == made) or (enters and not does.incoming):
                    continue
                if self._passes_through(owner, made, read, region):
                    where = owner or "the model"
                    return f"the forward of {where} may read it otherwise {does.words}"
        return None

    def _passes_through(self, owner: str, made: str, read: str, region: Region) -> bool:
        """Return whether a value from module `made` to module `read` passes through `owner`.

        It passes through the forwards of all modules around the one and the other.
        """
        if not is_within(made, owner) or not is_within(read, owner):
            return is_within(made, owner) or is_within(read, owner)
        below = _below(owner, made, region.entered)
        if below is None or below != _below(owner, read, region.entered):
            return True
        return any(is_within(name, below) for name in self._repeated[region.name])


def is_within(name: str, owner: str) -> bool:
    """Return whether `name` is `owner` or the name of a module below it."""
    return not owner or name == owner or name.startswith(f"{owner}.")


def _around(name: str, owners: Container[str]) -> Iterator[str]:
    """Yield those of `owners` that `name` is or lies within, the outermost first."""
    if "" in owners:
        yield ""
    end = 0
    while end >= 0 and name:
        end = name.find(".", end + 1)
        if (place := name if end < 0 else name[:end]) in owners:
            yield place


def _below(owner: str, name: str, entered: Set[str]) -> str | None:
    """Return the module that `owner` calls on the way to `name`, or None if they are the same."""
    place = owner
    for step in name[len(owner) :].lstrip(".").split(".") if name != owner else []:
        place = f"{place}.{step}" if place else step
        if place in entered:
            return place
    return None if name == owner else name


class _Search:
    """Follows arguments through the code of modules.

    A function is analyzed once for each set of them and each line of a forward that calls it.
    """

    def __init__(self, tree: Tree, entered: Set[str], readers: _Readers) -> None:
        self.found: dict[str, BranchEffects] = {}
        self._tree = tree
        self._entered = entered
        self._seen: set[tuple[Any, ...]] = set()
        self._readers = readers

    def function(
        self,
        owner: str,
        function: Callable[..., Any],
        tainted: frozenset[str],
        given: frozenset[str],
        at: Line | None = None,
    ) -> None:
        """Analyze a function that the module `owner` runs.

        Args:
            owner: the name of the module.
            function: the function.
            tainted: its parameters that may have any value.
            given: its parameters that may hold a value that the module was given.
            at: the line of the module's forward that calls it; None if it is that forward.
        """
        function = inspect.unwrap(function)
        if not tainted or (owner, function, tainted, given, at) in self._seen:
            return
        self._seen.add((owner, function, tainted, given, at))
        if _is_torch(function):
            return
        reader = self._read(function, tainted)
        values = self._read(function, given, _SIZES)
        if reader is None or values is None:
            choices = self._note(owner, tainted, at or UNKNOWN)
            choices.anything = choices.incoming = True
            return
        if reader.chosen:
            choices = self._note(owner, tainted)
            choices.anything |= None in reader.chosen
            for part in reader.chosen:
                choices.incoming |= part is None or values.spells(part)
                until(choices, at or line_of(function, part))
                if part is not None:
                    spell(part, choices)
        for call in reader.calls:
            self._follow(owner, function, (reader, values), call, at or line_of(function, call))

    def by_none(self, owner: str, function: Callable[..., Any], assumed: frozenset[str]) -> None:
        """Note what a root does where one of its inputs is None; in a trace none is."""
        function = inspect.unwrap(function)
        reader = None if _is_torch(function) else self._read(function, frozenset())
        if reader is None:
            return
        names, chosen = reader.by_none(_parameters(function) - assumed)
        for part in chosen:
            choices = self._note(owner, names, line_of(function, part))
            choices.incoming = True
            spell(part, choices)

    def _read(
        self,
        function: Callable[..., Any],
        tainted: frozenset[str],
        ignored: frozenset[str] = frozenset(),
    ) -> TaintAnalysis | None:
        key = (function, tainted, ignored)
        if key not in self._readers:
            code = source_of(function)
            self._readers[key] = (
                None if code is None else TaintAnalysis(code, tainted, ignored=ignored)
            )
        return self._readers[key]

    def _note(self, owner: str, tainted: Iterable[str], at: Line | None = None) -> BranchEffects:
        choices = self.found.setdefault(owner, BranchEffects({}, set(), set()))
        if at is not None:
            until(choices, at)
        choices.arguments.update(dict.fromkeys(sorted(tainted)))
        return choices

    def _follow(
        self, owner: str, function: Callable[..., Any],
        readers: tuple[TaintAnalysis, TaintAnalysis],
        call: ast.Call, at: Line,
    ) -> None:  # fmt: skip
        """Analyze what `call` calls; where that is unknown, every module that it could be."""
        assert isinstance(function, FunctionType)
        reader, values = readers
        path = path_of(call.func)
        if path and path[0] == reader.first:
            target, rest = self._walk(owner, path[1:])
            name = [*rest, "forward"][0]
            if len(rest) < 2 and self._enter(target, name, readers, call, (owner, at)):
                return
        elif path and path[0] in function.__globals__:
            value = function.__globals__[path[0]]
            if inspect.isfunction(value):
                free, given = (each.given(call, inspect.unwrap(value), skip=0) for each in readers)
                self.function(owner, value, free, given, at)
            elif inspect.ismodule(value):
                self._note(owner, reader.parameters, at).incoming |= values.spells(call)
            return
        elif len(path) == 1 and hasattr(builtins, path[0]):
            return
        name = call.func.attr if isinstance(call.func, ast.Attribute) else "forward"
        inside = sorted(p for p in self._entered if is_within(p, owner) and p != owner)
        places = [owner] if is_super(call.func) else inside
        entered = [self._enter(place, name, readers, call, (owner, at)) for place in places]
        if not any(entered):  # a method of a tensor is given the value
            self._note(owner, reader.parameters, at).incoming |= values.spells(call)

    def _walk(self, owner: str, path: list[str]) -> tuple[str, list[str]]:
        while path:
            child = self._tree.get(owner)._modules.get(path[0])
            if child is None:
                break
            owner, path = self._tree.name(child), path[1:]
        return owner, path

    def _enter(
        self,
        owner: str,
        name: str,
        readers: tuple[TaintAnalysis, TaintAnalysis],
        call: ast.Call,
        caller: tuple[str, Line],
    ) -> bool:
        """Analyze the method of a module that `call` calls; return whether there is one.

        All arguments of another module's method are values that it was given; a method of the
        module itself may get others.
        """
        found = False
        for base in type(self._tree.get(owner)).__mro__:
            function = vars(base).get(name)
            if base is not nn.Module and inspect.isfunction(function):
                plain = inspect.unwrap(function)
                free, given = (each.given(call, plain, skip=1) for each in readers)
                at: Line | None = caller[1]
                if owner != caller[0]:
                    given = _parameters(plain) - free
                    at = None if name == "forward" else UNKNOWN
                self.function(owner, function, free, given, at)
                found = True
                if not is_super(call.func):
                    break
        return found


def _calls_other_code(node: ast.AST, children: Container[str], code: CodeType) -> bool:
    """Return whether `node` calls a method of the module, or what a local name stands for."""
    if not isinstance(node, ast.Call):
        return False
    path = path_of(node.func)
    if not path:
        return not isinstance(node.func, ast.Attribute)
    if len(path) == 1:
        return path[0] in code.co_varnames
    return path[0] == "self" and len(path) == 2 and path[1] not in children


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters of a method, but for `self`."""
    return frozenset(list(inspect.signature(inspect.unwrap(function)).parameters)[1:])


def _is_torch(function: Callable[..., Any]) -> bool:
    return str(function.__module__).partition(".")[0] == "torch"
