"""Parse a pickle's opcodes into inert data, in order, without executing anything.

    pickle  = opcodes
    opcodes -> events: a list is made, a name is called, items are appended, a state is given

`pickletools` decodes the opcodes; nothing is imported, called or built here. Containers become
`ListOf`, `TupleOf`, `DictOf` and `SetOf`, a global becomes a `Name`, everything that is made of a
name becomes `Made`. What each is worth is judged elsewhere, before any of it is built.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from rewrite.errors import CheckpointError

_MOST_OPCODES, _MOST_NODES, _LONGEST_INT = 2_200_000, 700_000, 64

_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
_NAMES = {
    "builtins.long": "builtins.int",
    "builtins.unicode": "builtins.str",
    "builtins.xrange": "builtins.range",
}
"""How protocol 2, which is that of Python 2, spells what Python 3 calls otherwise."""


class Node:
    """Something of a pickle that is no number and no text."""

    __slots__ = ()

    def held(self) -> Iterable[Any]:
        """Return the nodes and values below this one."""
        return ()


@dataclass(eq=False, repr=False, slots=True)
class Name(Node):
    """A global: nothing but its name."""

    full: str


@dataclass(eq=False, repr=False, slots=True)
class ListOf(Node):
    """A list, or (`is_set`) a set."""

    items: list[Any] = field(default_factory=list)
    is_set: bool = False

    def held(self) -> Iterable[Any]:
        """Return the items."""
        return self.items


@dataclass(eq=False, repr=False, slots=True)
class TupleOf(Node):
    """A tuple, or (`frozen`) a frozenset."""

    items: tuple[Any, ...]
    frozen: bool = False

    def held(self) -> Iterable[Any]:
        """Return the items."""
        return self.items


@dataclass(eq=False, repr=False, slots=True)
class DictOf(Node):
    """A dict."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def held(self) -> Iterable[Any]:
        """Return keys and values."""
        return [part for pair in self.pairs for part in pair]


@dataclass(eq=False, repr=False, slots=True)
class Stored(Node):
    """A reference to the bytes of a storage."""

    about: tuple[Any, ...]

    def held(self) -> Iterable[Any]:
        """Return nothing: the reference is data of its own kind."""
        return ()


@dataclass(eq=False, repr=False, slots=True)
class Made(Node):
    """What a name was called with (`new`: as a class, for an instance), and what it got later."""

    function: Any
    args: Any
    new: bool
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name that was called, "" if it is no name."""
        return self.function.full if isinstance(self.function, Name) else ""

    def held(self) -> Iterable[Any]:
        """Return everything below."""
        yield self.function
        yield self.args
        yield from self.states
        yield from self.items
        for pair in self.pairs:
            yield from pair


@dataclass(frozen=True, repr=False, slots=True)
class Event:
    """A step of the pickle: a node is made, or one that is there gets something."""

    kind: str
    node: Node
    content: Any = None


@dataclass(frozen=True, repr=False, slots=True)
class Program:
    """A whole pickle: its steps, and what it stands for."""

    events: tuple[Event, ...]
    root: Any


def walk(root: Any) -> Iterator[Node]:
    """Yield each node at or below `root` once."""
    waiting, seen = [root], set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, Node) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting.extend(value.held())


def parse(stream: IO[bytes]) -> Program:
    """Return what one pickle says, and leave `stream` behind it.

    Raises:
        CheckpointError: it is no pickle, or one that no checkpoint needs.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _MOST_OPCODES or len(machine.events) > _MOST_NODES:
                raise CheckpointError("is a pickle of too many parts")
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError("is no checkpoint, or a damaged one") from error
    except (OverflowError, MemoryError, EOFError) as error:
        raise CheckpointError("is no checkpoint, or a damaged one") from error
    return Program(tuple(machine.events), machine.root)


_EMPTY: dict[str, type[Node]] = {"EMPTY_LIST": ListOf, "EMPTY_DICT": DictOf}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {
        *("BINBYTES", "BINBYTES8", "BINFLOAT", "BININT", "BININT1", "BININT2", "BINSTRING"),
        *("BINUNICODE", "BINUNICODE8", "FLOAT", "INT", "LONG", "LONG1", "LONG4", "UNICODE"),
        *("SHORT_BINBYTES", "SHORT_BINSTRING", "SHORT_BINUNICODE", "STRING"),
    }
)
_NOTHING = frozenset({"PROTO", "FRAME"})


class _Machine:
    """The stack, the marks and the memo of a pickle."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.root: Any = None
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Take one opcode."""
        if name in _VALUES:
            self._stack.append(_plain(argument))
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _NOTHING:
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._memo[argument])
        elif name in _EMPTY:
            self._make(_EMPTY[name]())
        else:
            handler = getattr(self, f"_on_{name.lower()}", None)
            if handler is None:
                raise CheckpointError(f"is a pickle with {name}, which no checkpoint needs")
            handler(argument)

    def _make(self, node: Node) -> None:
        self.events.append(Event("make", node))
        self._stack.append(node)

    def _to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    # -- one method an opcode ------------------------------------------------------------------

    def _on_mark(self, _: Any) -> None:
        if len(self._marks) > 10_000:
            raise CheckpointError("is a pickle that is nested too deep")
        self._marks.append(self._stack)
        self._stack = []

    def _on_stop(self, _: Any) -> None:
        self.root = self._stack.pop()
        if self._stack or self._marks:
            raise ValueError

    def _on_pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def _on_pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _on_dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _on_empty_tuple(self, _: Any) -> None:
        self._make(TupleOf(()))

    def _on_tuple(self, _: Any) -> None:
        self._make(TupleOf(tuple(self._to_mark())))

    def _on_tuple1(self, _: Any) -> None:
        self._take(1)

    def _on_tuple2(self, _: Any) -> None:
        self._take(2)

    def _on_tuple3(self, _: Any) -> None:
        self._take(3)

    def _take(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._make(TupleOf(items))

    def _on_list(self, _: Any) -> None:
        items = self._to_mark()
        self._make(ListOf())
        self._append(items)

    def _on_dict(self, _: Any) -> None:
        items = self._to_mark()
        self._make(DictOf())
        self._set(items)

    def _on_empty_set(self, _: Any) -> None:
        self._make(ListOf(is_set=True))

    def _on_frozenset(self, _: Any) -> None:
        self._make(TupleOf(tuple(self._to_mark()), frozen=True))

    def _on_bytearray8(self, argument: Any) -> None:
        name, args = Name("builtins.bytearray"), TupleOf((bytes(argument),))
        self.events += [Event("make", name), Event("make", args)]
        self._make(Made(name, args, new=False))

    def _on_append(self, _: Any) -> None:
        item = self._stack.pop()
        self._append([item])

    def _on_appends(self, _: Any) -> None:
        self._append(self._to_mark())

    def _on_additems(self, _: Any) -> None:
        self._append(self._to_mark())

    def _append(self, items: list[Any]) -> None:
        node = self._stack[-1]
        if not isinstance(node, ListOf | Made):
            raise CheckpointError("appends to what is no list")
        node.items.extend(items)
        self.events.append(Event("append", node, items))

    def _on_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _on_setitems(self, _: Any) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        node = self._stack[-1]
        if not isinstance(node, DictOf | Made):
            raise CheckpointError("sets items of what is no dict")
        pairs = list(zip(items[::2], items[1::2], strict=True))
        node.pairs.extend(pairs)
        self.events.append(Event("set", node, pairs))

    def _on_global(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._name(module, name)

    def _on_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        full = f"{_MODULES.get(module, module)}.{name}"
        if not (full.isprintable() and len(full) < 300):
            raise CheckpointError("names something that is no name")
        self._make(Name(_NAMES.get(full, full)))

    def _on_reduce(self, _: Any) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._make(Made(function, args, new=False))

    def _on_newobj(self, _: Any) -> None:
        args, kind = self._stack.pop(), self._stack.pop()
        self._make(Made(kind, args, new=True))

    def _on_newobj_ex(self, _: Any) -> None:
        kwargs = self._stack.pop()
        if not (isinstance(kwargs, DictOf) and not kwargs.pairs):
            raise CheckpointError("makes an instance with keywords of its own")
        self._on_newobj(None)

    def _on_build(self, _: Any) -> None:
        state = self._stack.pop()
        node = self._stack[-1]
        if not isinstance(node, Made):
            raise CheckpointError("gives a state to what has none")
        node.states.append(state)
        self.events.append(Event("build", node, state))

    def _on_binpersid(self, _: Any) -> None:
        about = self._stack.pop()
        if not isinstance(about, TupleOf):
            raise CheckpointError("refers to something outside of itself that is no storage")
        if about.items[:1] == ("module",) and isinstance(about.items[1], Name):
            # The format before zip refers so to a class, with its source code beside it.
            self._stack.append(about.items[1])
        else:
            self._make(Stored(about.items))


def _plain(value: Any) -> Any:
    """Return a number or a text of the pickle."""
    if isinstance(value, int) and value.bit_length() > 8 * _LONGEST_INT:
        raise CheckpointError("holds a number of too many digits")
    return value
