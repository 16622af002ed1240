"""Lines that no observed call took, in the code between a norm and what reads it.

    def forward(self, x, raw=False):
        h = self.norm(x)
        if raw:
            return self.head(h * 2)      # no call took it, and it reads h: the fold is refused
        return self.head(h)

Names are followed through each function on the way, in the order of its statements: from the norm's
call outwards through what returns its value, and inwards into what is given it. A line was taken if
it made a value or called a module in some call. A statement that was not may hand the value on (an
alias, a return, a list of outputs); where it computes with it or calls a reader, the fold is
refused, with that line. Decorators that pass on whatever they are given are passed through.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn
from torch.fx import Node

from rewrite.graph.captured import Captured
from rewrite.observe.code.fields import UnobservedLine
from rewrite.observe.code.names import Others
from rewrite.observe.code.reader import FunctionReader
from rewrite.observe.code.state import Other, Returned
from rewrite.observe.code.syntax import (
    Fixed,
    Function,
    code_of,
    definition,
    forward_of,
    function_at,
)
from rewrite.observe.evidence import Evidence
from rewrite.observe.export import CodeLine, ObservedCall, in_torch
from rewrite.observe.spellings import op_name, shape_of

_READ_AT_MOST = 4000


class CodeIndex:
    """Which lines ran in the calls of some evidence, and which functions each of them called.

    Frames of torch, and of decorators that pass on whatever they are given, are left out.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.lines: dict[str, set[int]] = {}
        self.callees: dict[tuple[str, int], set[CodeLine]] = {}
        self.ran = frozenset[str]().union(*(observed.ran for observed in evidence.calls))
        self._plain: dict[CodeLine, bool] = {}
        for observed in evidence.calls:
            for stack in observed.stacks:
                plain = self.outside(stack)
                for line in plain:
                    self.lines.setdefault(line.file, set()).add(line.number)
                for caller, callee in itertools.pairwise(plain):
                    self.callees.setdefault((caller.file, caller.number), set()).add(callee)

    def outside(self, stack: Sequence[CodeLine]) -> tuple[CodeLine, ...]:
        """Return the lines of a stack that are the model's own."""
        return tuple(line for line in stack if self._is_plain(line))

    def _is_plain(self, line: CodeLine) -> bool:
        if line not in self._plain:
            found = None if in_torch(line.file) else function_at(line.file, line.number)
            passes = found is not None and found[0].args.vararg is not None
            self._plain[line] = not in_torch(line.file) and not passes
        return self._plain[line]


class Called(Protocol):
    """A call in a graph."""

    @property
    def node(self) -> Node:
        """The call."""


class Followed(Protocol):
    """The values that carry a map in one call, and the calls that absorb it."""

    @property
    def labels(self) -> Iterable[Node]:
        """The values."""

    @property
    def reads(self) -> Iterable[Called]:
        """The calls that absorb the map."""


class MapPlan(Protocol):
    """What is about to be changed, as far as code has to be held against it."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules at which the map begins."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that absorb the map."""

    @property
    def guarded(self) -> tuple[str, ...]:
        """The modules that no line may call which no observed call took."""

    @property
    def notes(self) -> list[str]:
        """What a user has to know of it."""

    @property
    def sites(self) -> Sequence[tuple[ObservedCall, Called]]:
        """The calls at which the map begins."""

    @property
    def flows(self) -> Sequence[tuple[ObservedCall, Followed]]:
        """Where it goes."""


@dataclass(eq=False)
class CodeCheck:
    """Reads the code around one fold, or around another map that values carry."""

    captured: Captured
    index: CodeIndex
    fold: MapPlan
    _made: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    _owners: list[str] = field(default_factory=list)
    _given: dict[str, None] = field(default_factory=dict)
    _mapped: set[tuple[str, int]] = field(default_factory=set)
    _absorbed: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    _done: dict[
        tuple[tuple[str, int], frozenset[str], tuple[CodeLine, ...], Fixed, Others], Returned
    ] = field(default_factory=dict)

    def check(self, strict: bool = False) -> None:
        """Refuse the fold if code that no call took reads its values; if `strict`, returns them.

        Arguments of the model that stand for its values are noted with the plan.

        Raises:
            UnobservedLine: it does; the line is named.
        """
        owners: dict[str, None] = {}
        for observed, node in self._values():
            owners.update(dict.fromkeys(observed.owners(node)))
            if stack := self.index.outside(observed.stack(node)):
                self._mapped.add((stack[-1].file, stack[-1].number))
                self._note(stack[-1], node, observed.owner(node))
        for observed, flow in self.fold.flows:
            for read in flow.reads:
                owners.update(dict.fromkeys(observed.owners(read.node)))
                if stack := self.index.outside(observed.stack(read.node)):
                    place = (stack[-1].file, stack[-1].number)
                    self._absorbed.setdefault(place, set()).add(op_name(read.node))
        self._owners = list(owners)
        _check_siblings(self.captured, self.index, self.fold.layers)
        _check_wrappers(self.captured, self.index, self.fold.guarded)
        for observed, site in self.fold.sites:
            if not self.index.outside(observed.stack(site.node)):
                _check_readable(self.captured, observed.owners(site.node))
        for chain in {self.index.outside(o.stack(s.node)) for o, s in self.fold.sites}:
            if chain and self.inner(chain, others=_arguments).held and strict:
                raise UnobservedLine("the model may return it for other arguments")
        for name in self._given:
            self.fold.notes.append(f"{name} has to come from the new model where it is given")

    def _running(self, function: Function) -> Iterator[str]:
        """Yield the modules around the values whose forward a function is."""
        for name in self._owners:
            if forward_of(self.captured.tree.names.get(name)) is function.node:
                yield name

    def _note(self, line: CodeLine, node: Node, owner: str) -> None:
        """Note how many axes the values have at least that a line makes and reads, and for whom."""
        shapes = [shape_of(n) for n in (node, *node.all_input_nodes)]
        ranks = [len(shape) for shape in shapes if shape is not None and len(shape) > 1]
        self._made.setdefault(line.file, []).append((line.number, min(ranks, default=1), owner))

    def _made_in(self, function: Function) -> list[tuple[int, int, str]]:
        first, last = function.node.lineno, function.node.end_lineno or function.node.lineno
        return [made for made in self._made.get(function.file, ()) if first <= made[0] <= last]

    def rank_of(self, function: Function) -> int:
        """Return how many axes the values have at least that a function makes, or any code."""
        here = [rank for _, rank, _ in self._made_in(function)]
        anywhere = [rank for held in self._made.values() for _, rank, _ in held]
        return min(here or anywhere, default=1)

    def _values(self) -> Iterator[tuple[ObservedCall, Node]]:
        for observed, flow in self.fold.flows:
            yield from ((observed, node) for node in flow.labels)

    # -- what the reader of a function asks -----------------------------------------------------

    def inner(
        self,
        chain: tuple[CodeLine, ...],
        fixed: Callable[[Function], Fixed] = lambda _: frozenset(),
        others: Callable[[Function], Others] = lambda _: frozenset(),
    ) -> Returned:
        """Read the function of the first line of `chain`, in which the norm is called there.

        `fixed`: which parameters of that function have known values; `others`: which may be other
        values than the one that is followed.
        """
        found = function_at(chain[0].file, chain[0].number)
        if found is None:
            raise UnobservedLine(f"the code at {chain[0]} cannot be read")
        function = Function(chain[0].file, *found)
        return self.read(function, frozenset(), chain, fixed(function), others(function))

    def read(
        self,
        function: Function,
        tainted: frozenset[str],
        chain: tuple[CodeLine, ...] = (),
        fixed: Fixed = frozenset(),
        others: Others = frozenset(),
    ) -> Returned:
        """Read a function whose parameters `tainted` hold the value; does it return it, where?

        Its parameters `fixed` are at their defaults, and `others` may be other values.
        """
        key = (function.key, tainted, chain, fixed, others)
        if key not in self._done:
            if len(self._done) > _READ_AT_MOST:
                raise UnobservedLine("its code is too long to be followed")
            self._done[key] = Returned(True)  # while it is being read: a recursion hands it on
            reader = FunctionReader(self, function, set(tainted), chain, fixed, others)
            reader.block(function.node.body)
            fields = reader.fields if reader.returns else None
            self._done[key] = Returned(reader.returns, fields, reader.instead)
        return self._done[key]

    def note_given(self, name: str, place: str) -> None:
        """Note that an argument of the model stands for the value, or refuse it."""
        _check_given(self.captured.model, name, place)
        self._given[name] = None

    def modules(self, function: Function) -> list[nn.Module]:
        """Return the modules whose forward a function may be a part of."""
        return [self.captured.module(name) for name in self._instances(function)]

    def _instances(self, function: Function) -> list[str]:
        if not function.inside and function.first == "self":  # a forward that is set from outside
            made = [owner for _, _, owner in self._made_in(function)]
            return list(dict.fromkeys([*self._running(function), *made]))
        return [
            name
            for name in self._owners
            if name in self.captured.tree.names
            and function.inside in {k.__name__ for k in type(self.captured.module(name)).__mro__}
        ]

    def reader_names(self, function: Function) -> set[str]:
        """Return the children of those modules on the way to a reader, or to the norm."""
        names: set[str] = set()
        for owner in self._instances(function):
            prefix = f"{owner}." if owner else ""
            for target in self.fold.guarded:
                if target.startswith(prefix):
                    names.add(target.removeprefix(prefix).split(".")[0])
        return names

    def reaches(self, function: Function, path: Sequence[str], chain: tuple[CodeLine, ...]) -> bool:
        """Return whether a call by that name is how the norm is reached, along a chain of lines."""
        if not path:
            return False
        below = function_at(chain[1].file, chain[1].number) if len(chain) > 1 else None
        if path[0] == function.first and len(path) > 1:
            places = [".".join(filter(None, (o, *path[1:]))) for o in self._instances(function)]
            if any(self._leads_to(place, below) for place in places):
                return True
        return below is not None and below[0].name == path[-1]

    def _leads_to(self, place: str, below: tuple[ast.FunctionDef, str] | None) -> bool:
        """Return whether a target is in a module, and the next line, if any, in its forward."""
        own = forward_of(self.captured.tree.names.get(place))
        if own is not None and own.args.vararg is None and (below is None or own is not below[0]):
            return False
        return any(t == place or t.startswith(f"{place}.") for t in self.fold.targets)

    def taken(self, file: str, node: ast.stmt) -> bool:
        """Return whether a call made a value, or called a module, on a line of a statement."""
        held = self.index.lines.get(file, set())
        return any(number in held for number in _span(node))

    def moves(self, file: str, node: ast.stmt) -> bool:
        """Return whether a value that carries the map was made on a line of a statement."""
        return any((file, number) in self._mapped for number in _span(node))

    def absorbs(self, function: Function, node: ast.stmt, path: Sequence[str]) -> bool:
        """Return whether what a call by that name returns is the output of a layer that reads."""
        if self.is_layer(function, path):
            return True
        names = set().union(*(self._absorbed.get((function.file, n), ()) for n in _span(node)))
        return bool(path) and path[-1] in names

    def reads_on(self, file: str, node: ast.stmt) -> bool:
        """Return whether a layer that absorbs the map reads it on a line of a statement."""
        return any((file, number) in self._absorbed for number in _span(node))

    def is_layer(self, function: Function, path: Sequence[str]) -> bool:
        """Return whether a call by that name is one of a layer that reads the value."""
        if len(path) < 2 or path[0] != function.first:
            return False
        child, owners = ".".join(path[1:]), self._instances(function)
        return any((f"{o}.{child}" if o else child) in self.fold.layers for o in owners)

    def callees(self, file: str, node: ast.stmt) -> list[Function]:
        """Return the functions that ran in what a statement called."""
        found: dict[tuple[str, int], Function] = {}
        for number in _span(node):
            for line in self.index.callees.get((file, number), ()):
                held = function_at(line.file, line.number)
                if held is not None:
                    function = Function(line.file, *held)
                    found[function.key] = function
        return list(found.values())


def _check_given(model: nn.Module, name: str, place: str) -> None:
    """Refuse an argument that a caller may give in place of the value, but for transformers.

    There it is what the same model returned before: the outputs of its encoder, a cache, embeddings
    of its images. Anybody else may give any value.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnobservedLine(
            f"{place} may read {name} in its place, which is what the caller gives"
        )


def _check_readable(captured: Captured, owners: Iterable[str]) -> None:
    """Refuse a call without a line, in code of the model that is in no file."""
    for module in (captured.tree.names.get(name) for name in owners):
        code = code_of(module)
        if code is not None and not in_torch(code.co_filename) and definition(code) is None:
            raise UnobservedLine(f"the code of {type(module).__name__} is in no file")


def _check_siblings(captured: Captured, index: CodeIndex, layers: Iterable[str]) -> None:
    """Refuse a reader that is one item of several, of which calls chose only some."""
    for layer in layers:
        parent = layer.rpartition(".")[0]
        holder = captured.tree.names.get(parent)
        if not isinstance(holder, nn.ModuleDict | nn.ModuleList):
            continue
        for name, _ in holder.named_children():
            if f"{parent}.{name}" not in index.ran:
                raise UnobservedLine(f"{parent} also holds {name}, which no call chose")


def _check_wrappers(captured: Captured, index: CodeIndex, names: Iterable[str]) -> None:
    """Refuse a module in a wrapper that holds another like it, which its state may choose instead.

    The forward of such a wrapper (an adapter that can be disabled) passes on whatever it is given.
    """
    for name in names:
        module, owner = captured.tree.names.get(name), name.rpartition(".")[0]
        if isinstance(captured.tree.names.get(owner), nn.ModuleDict | nn.ModuleList):
            owner = owner.rpartition(".")[0]
        wrapper = captured.tree.names.get(owner)
        forward = forward_of(wrapper)
        if module is None or wrapper is None or forward is None or forward.args.vararg is None:
            continue
        for key, child in wrapper.named_children():
            if type(child) is type(module) and f"{owner}.{key}" not in index.ran:
                raise UnobservedLine(f"{owner} also holds {key}, which no call ran")


def _arguments(function: Function) -> Others:
    """Return the arguments of a model: what its callers give."""
    args = function.node.args
    loose = [a.arg for a in (args.vararg, args.kwarg) if a is not None]
    place = f"{function.file.rpartition('/')[2]}:{function.node.lineno}"
    return frozenset(
        (name, Other(place, name, True)) for name in (*function.parameters[1:], *loose)
    )


def _span(node: ast.stmt) -> range:
    """Return the lines of a statement; of one with a body, those of its head."""
    last = node.end_lineno or node.lineno
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
        last = max(node.lineno, body[0].lineno - 1)
    return range(node.lineno, last + 1)
