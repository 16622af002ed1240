"""Code that a trace did not take: what other values of optional arguments would make it do.

    def forward(self, x, raw=False):
        if raw:                          # a choice: values of this forward may be read elsewhere,
            return self.block.conv(x)    # and what is spelled here may be called from here
        return self.block(x)

A trace takes every optional argument of the model at its default, and every other one to be there.
This reads the code instead: from the forward of a region's root, on into each method, module and
function that is given an optional argument, or what is computed from it. Names are followed, values
are not: what is found may run. What a call returns is a new value, so an attention's mask, which is
added to scores, says nothing of the value that the attention was given.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections import Counter
from collections.abc import Callable, Container, Iterable, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.fx import Node

from rewrite.runtime.tree import Tree
from rewrite.tracing.code.source import source_of
from rewrite.tracing.decisions import place_of, statement_at, uncertain_values
from rewrite.tracing.regions import Region
from rewrite.tracing.taint import TaintAnalysis, is_super, path_of

_Readers = dict[tuple[Any, frozenset[str], frozenset[str]], TaintAnalysis | None]

_SIZES = frozenset({"shape", "size", "ndim", "dim", "numel", "dtype", "device"})
"""What is asked of a value without reading it."""


@dataclass
class BranchEffects:
    """What the code of one module does by the value of an argument.

    Attributes:
        arguments: the names of the arguments, in that code.
        called: attributes that it calls there.
        used: attributes that it spells in any other way there.
        anything: whether it may call whatever it holds.
        incoming: whether it may read a value that the module was given.
        sizes: the lines on which it decides by a size or a mode, and when that is another.
    """

    arguments: dict[str, None]
    called: set[str]
    used: set[str]
    anything: bool = False
    incoming: bool = False
    sizes: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """When it does that."""
        if self.sizes:
            return f"{next(iter(self.sizes.values()))} ({', '.join(self.sizes)})"
        return f"for another value of its argument {', '.join(self.arguments)}"

    def may_call(self, path: str) -> bool:
        """Return whether that code could call the module at `path`, below its own."""
        parts = path.split(".")
        item = parts[-1].isdigit()
        while len(parts) > 1 and parts[-1].isdigit():
            parts.pop()
        return self.anything or parts[-1] in self.used or (not item and parts[-1] in self.called)


class UntracedBranches:
    """The choices of a captured model, read from its code when somebody first asks."""

    def __init__(self, tree: Tree, regions: tuple[Region, ...]) -> None:
        self._tree = tree
        self._regions = regions
        self._readers: _Readers = {}

    @cached_property
    def _choices(self) -> dict[str, dict[str, BranchEffects]]:
        """By region, and by the name of the module whose code chooses."""
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
        """By region: what its code may call for an input of another size."""
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
                _spell(statement, does)
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
        """By region: the modules whose forward ran more than once."""
        found: dict[str, set[str]] = {}
        for region in self._regions:
            runs = Counter(frame.owner for frame in set(region.frames.values()))
            found[region.name] = {owner for owner, times in runs.items() if times > 1}
        return found

    def caller(self, place: str) -> str | None:
        """Return what may call the module at `place` in code that did not run, in words."""
        for region in (*self._choices.values(), *self._by_size.values()):
            for owner, does in region.items():
                below = place[len(owner) :].lstrip(".") if is_within(place, owner) else ""
                if below and does.may_call(below):
                    where = owner or "the model"
                    return f"the forward of {where} may call {place} {does.words}"
        return None

    def reader(self, region: Region, node: Node) -> str | None:
        """Return what may read `node` otherwise in code that did not run, in words."""
        if (line := self._uncertain[region.name].get(node)) is not None:
            return f"the code at {line}"
        if not (found := self._choices[region.name]):
            return None
        made = region.frames[node].owner
        for user in node.users:
            read = region.frames[user].owner if user in region.frames else made
            for owner, does in found.items():
                enters = not is_within(made, owner) and is_within(read, owner)
                if enters and not does.incoming:
                    continue
                if self._passes_through(owner, made, read, region):
                    where = owner or "the model"
                    return f"the forward of {where} may read it otherwise {does.words}"
        return None

    def _passes_through(self, owner: str, made: str, read: str, region: Region) -> bool:
        """Return whether the forward of `owner` holds a value that `made` makes and `read` reads.

        A value from one module to another goes by those around the one and the other.
        """
        if not is_within(made, owner) or not is_within(read, owner):
            return is_within(made, owner) or is_within(read, owner)
        below = _below(owner, made, region.entered)
        if below is None or below != _below(owner, read, region.entered):
            return True
        return any(is_within(name, below) for name in self._repeated[region.name])


def is_within(name: str, owner: str) -> bool:
    """Return whether `name` is that of `owner` or of a module in it."""
    return not owner or name == owner or name.startswith(f"{owner}.")


def _below(owner: str, name: str, entered: Set[str]) -> str | None:
    """Return the module that `owner` calls on the way to `name`, or None if they are the same."""
    place = owner
    for step in name[len(owner) :].lstrip(".").split(".") if name != owner else []:
        place = f"{place}.{step}" if place else step
        if place in entered:
            return place
    return None if name == owner else name


class _Search:
    """Follows arguments through the code of modules, each function once for each set of them."""

    def __init__(self, tree: Tree, entered: Set[str], readers: _Readers) -> None:
        self.found: dict[str, BranchEffects] = {}
        self._tree = tree
        self._entered = entered
        self._seen: set[tuple[str, Any, frozenset[str], frozenset[str]]] = set()
        self._readers = readers

    def function(
        self,
        owner: str,
        function: Callable[..., Any],
        tainted: frozenset[str],
        given: frozenset[str],
    ) -> None:
        """Read a function that is run by the module `owner`.

        Its parameters `tainted` are free, and `given` may hold what the module was given.
        """
        function = inspect.unwrap(function)
        if not tainted or (owner, function, tainted, given) in self._seen:
            return
        self._seen.add((owner, function, tainted, given))
        if _is_torch(function):
            return
        reader = self._read(function, tainted)
        values = self._read(function, given, _SIZES)
        if reader is None or values is None:
            choices = self._note(owner, tainted)
            choices.anything = choices.incoming = True
            return
        if reader.chosen:
            choices = self._note(owner, tainted)
            choices.anything |= None in reader.chosen
            for part in reader.chosen:
                choices.incoming |= part is None or values.spells(part)
                if part is not None:
                    _spell(part, choices)
        for call in reader.calls:
            self._follow(owner, function, (reader, values), call)

    def by_none(self, owner: str, function: Callable[..., Any], assumed: frozenset[str]) -> None:
        """Note what a root does where one of its inputs is None; a trace has seen the other way."""
        function = inspect.unwrap(function)
        reader = None if _is_torch(function) else self._read(function, frozenset())
        if reader is None:
            return
        names, chosen = reader.by_none(_parameters(function) - assumed)
        for part in chosen:
            choices = self._note(owner, names)
            choices.incoming = True
            _spell(part, choices)

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

    def _note(self, owner: str, tainted: Iterable[str]) -> BranchEffects:
        choices = self.found.setdefault(owner, BranchEffects({}, set(), set()))
        choices.arguments.update(dict.fromkeys(sorted(tainted)))
        return choices

    def _follow(
        self, owner: str, function: Callable[..., Any],
        readers: tuple[TaintAnalysis, TaintAnalysis],
        call: ast.Call,
    ) -> None:  # fmt: skip
        """Go on in what `call` calls; where that is unknown, in each module that it could be."""
        assert isinstance(function, FunctionType)
        reader, values = readers
        path = path_of(call.func) or []
        if path and path[0] == reader.first:
            target, rest = self._walk(owner, path[1:])
            if len(rest) < 2 and self._enter(target, [*rest, "forward"][0], readers, call, owner):
                return
        elif path and path[0] in function.__globals__:
            value = function.__globals__[path[0]]
            if inspect.isfunction(value):
                got = (each.given(call, inspect.unwrap(value), skip=0) for each in readers)
                self.function(owner, value, *got)
            elif inspect.ismodule(value):
                self._note(owner, reader.parameters).incoming |= values.spells(call)
            return
        elif len(path) == 1 and hasattr(builtins, path[0]):
            return
        name = call.func.attr if isinstance(call.func, ast.Attribute) else "forward"
        inside = sorted(p for p in self._entered if is_within(p, owner) and p != owner)
        places = [owner] if is_super(call.func) else inside
        entered = [self._enter(place, name, readers, call, owner) for place in places]
        if not any(entered):  # a method of a tensor is given the value
            self._note(owner, reader.parameters).incoming |= values.spells(call)

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
        caller: str,
    ) -> bool:
        """Read the method of a module that `call` calls; return whether it has such a method.

        Whatever another module is given is given to it; its own methods may be given less.
        """
        found = False
        for base in type(self._tree.get(owner)).__mro__:
            function = vars(base).get(name)
            if base is not nn.Module and inspect.isfunction(function):
                plain = inspect.unwrap(function)
                free, given = (each.given(call, plain, skip=1) for each in readers)
                if owner != caller:
                    given = _parameters(plain) - free
                self.function(owner, function, free, given)
                found = True
                if not is_super(call.func):
                    break
        return found


def _calls_other_code(node: ast.AST, children: Container[str], code: CodeType) -> bool:
    """Return whether `node` calls a method of the module, or what a local name stands for."""
    if not isinstance(node, ast.Call):
        return False
    path = path_of(node.func)
    if path is None:
        return not isinstance(node.func, ast.Attribute)
    if len(path) == 1:
        return path[0] in code.co_varnames
    return path[0] == "self" and len(path) == 2 and path[1] not in children


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters of a method, but for `self`."""
    return frozenset(list(inspect.signature(inspect.unwrap(function)).parameters)[1:])


def _is_torch(function: Callable[..., Any]) -> bool:
    return str(function.__module__).partition(".")[0] == "torch"


def _spell(code: ast.AST, choices: BranchEffects) -> None:
    called = {id(n.func) for n in ast.walk(code) if isinstance(n, ast.Call)}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute):
            (choices.called if id(node) in called else choices.used).add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            choices.used.add(node.value)
