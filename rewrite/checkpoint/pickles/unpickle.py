"""Open a pickled checkpoint without running foreign code.

    file    = bytes of tensors + a pickle
    pickle -> inert data (`opcodes`)                  nothing is imported or called
    names  -> meanings (`names`)                      judged as text, then looked up
    events -> objects                                 each made by code of this package

A class may be instantiated empty and given its state, as pickle does with modules; it may not be
*called*, since a constructor does whatever its arguments say. Only what is asked for is built: of
a training checkpoint the state dict alone.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.checkpoint.allowed_functions import FUNCTION_PLACES, held_function
from rewrite.checkpoint.archive import Archive, TensorBytes, opened
from rewrite.checkpoint.pickles import natives, tensors
from rewrite.checkpoint.pickles.judgement import Judgement
from rewrite.checkpoint.pickles.legacy import read_legacy
from rewrite.checkpoint.pickles.names import (
    HELD,
    NameUse,
)
from rewrite.checkpoint.vetting.opcodes import (
    DictOf,
    Event,
    ListOf,
    Made,
    Name,
    Node,
    Program,
    Stored,
    TupleOf,
    walk,
)
from rewrite.checkpoint.vetting.programs import archived_program
from rewrite.checkpoint.vetting.tree import NO_LOOKUP
from rewrite.errors import CheckpointError, one_line


@dataclass(frozen=True)
class PickleFile:
    """A checkpoint that was parsed and not yet built."""

    path: Path
    program: Program
    source: TensorBytes

    def build(
        self,
        root: Any,
        trust: Sequence[str] = (),
        map_location: str | torch.device = "cpu",
        *,
        whole: bool = False,
    ) -> Any:
        """Return what a node of the pickle stands for.

        Args:
            root: A node of `program`.
            trust: Packages, or full names of classes and functions, allowed beside the lists.
            map_location: The device that the tensors go to.
            whole: Judge everything in the file, not only what `root` needs.

        Raises:
            CheckpointError: something in it may not be opened; nothing was built then.
        """
        needed = list(walk(root))
        judged = [event.node for event in self.program.events] if whole else needed
        storages = tensors.Storages(self.source, torch.device(map_location))
        try:
            judgement = Judgement.of(judged, tuple(trust))
            builder = _Builder(judgement, storages)
            return builder.build(self.program, root, {id(node) for node in needed})
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except DAMAGED as error:
            raise CheckpointError(f"{self.path}: cannot be read: {one_line(error)}") from error


DAMAGED = (
    TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, OverflowError,
    RecursionError, MemoryError, NotImplementedError,
)  # fmt: skip
"""What a state that does not fit its class raises; whatever it is, the file is the reason."""


@contextmanager
def opened_pickle(path: Path) -> Iterator[PickleFile]:
    """Parse the pickle of a `torch.save` file, of either format.

    Raises:
        CheckpointError: it is damaged, or none.
    """
    with opened(path) as stream:
        try:
            if stream.read(2) == b"PK":
                stream.seek(0)
                archive = Archive(stream)
                program, source = read_archive(archive)
            else:
                stream.seek(0)
                program, source = read_legacy(stream, path.stat().st_size)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        yield PickleFile(path, program, source)


def read_archive(archive: Archive) -> tuple[Program, TensorBytes]:
    """Return the pickle of a zip archive, and the reader of its tensors."""
    return archived_program(archive), _DataFolder(archive)


@dataclass(frozen=True)
class _DataFolder:
    """The tensors of an archive, which lie below `data/`."""

    archive: Archive

    def storage(self, key: str, size: int) -> torch.UntypedStorage:
        return self.archive.storage(f"data/{key}", size)


def load_pickle(
    path: Path,
    *,
    trust: Sequence[str] = (),
    map_location: str | torch.device = "cpu",
) -> Any:
    """Return the object of a `torch.save` file; raise CheckpointError for what may not be opened.

    Args:
        path: A file written by `torch.save`.
        trust: Packages, or full names of single classes and functions, allowed beside the lists.
        map_location: Where the tensors go.
    """
    with opened_pickle(path) as file:
        return file.build(file.program.root, trust, map_location, whole=True)


class _Builder:
    """Replays the events of a pickle, as far as they are needed."""

    def __init__(self, judgement: Judgement, storages: tensors.Storages) -> None:
        self.judgement = judgement
        self.storages = storages
        self._meanings = judgement.meanings
        self._made: dict[int, Any] = {}

    def build(self, program: Program, root: Any, needed: set[int]) -> Any:
        """Return the object of `root`."""
        for event in program.events:
            if id(event.node) in needed:
                if event.kind == "make":
                    self._made[id(event.node)] = self._make(event.node)
                else:
                    self._change(event)
        if id(root) in self._made or not isinstance(root, TupleOf):
            return self.real(root)
        return tuple(self._all(root.items))

    def real(self, value: Any) -> Any:
        """Return the object of a value of the pickle."""
        if not isinstance(value, Node):
            return value
        if isinstance(value, Name):
            meaning = self._meanings[value.full]
            held = meaning.use in HELD or (
                meaning.use is NameUse.NATIVE and meaning.value is not None
            )
            if not held:
                raise CheckpointError(
                    f"keeps {value.full} as a value, where a model holds instances"
                )
            return meaning.value
        return self._made[id(value)]

    def _all(self, values: Sequence[Any]) -> list[Any]:
        return [self.real(value) for value in values]

    # -- making ----------------------------------------------------------------------------------

    def _make(self, node: Node) -> Any:
        if isinstance(node, ListOf):
            return set() if node.is_set else []
        if isinstance(node, DictOf):
            return {}
        if isinstance(node, TupleOf):
            if id(node) in self.judgement.judges_itself:
                return node.items
            items = self._all(node.items)
            return frozenset(map(hashable, items)) if node.frozen else tuple(items)
        if isinstance(node, Stored):
            return tensors.Reference.of(node)
        if isinstance(node, Made):
            return self._call(node)
        return None

    def _call(self, node: Made) -> Any:
        args: Any
        meaning = self._meanings[node.name]
        args = self._made.get(id(node.args), ()) if node.args.items else ()
        match meaning.use:
            case NameUse.TENSOR:
                return tensors.BUILDERS[node.name](self.storages, args)
            case NameUse.NATIVE:
                if node.name in ("builtins.set", "builtins.frozenset"):
                    args = ([hashable(part) for part in natives.one_list(*args)],)
                return natives.BUILDERS[node.name](*args)
            case NameUse.SAVED:
                if args:
                    raise CheckpointError(f"makes a {node.name} with arguments of its own")
                return meaning.value(self.judgement.trust)
            case NameUse.PARTIAL:
                return functools.partial(args[0])
            case NameUse.ENUM:
                return _member_of_value(meaning.value, args, node.name)
            case NameUse.MEMBER:
                return self._member(node)
            case NameUse.REBUILD:
                return self._instance(node.args.items[0])
        if node.args.items:
            return meaning.value(*args)  # a named tuple
        return meaning.value.__new__(meaning.value)

    def _instance(self, kind: Any) -> Any:
        if not isinstance(kind, Name) or not isinstance(self._meanings[kind.full].value, type):
            raise CheckpointError("makes an instance of something that is no class")
        if self._meanings[kind.full].use not in (NameUse.LAYER, NameUse.INSTANCE):
            raise CheckpointError(f"makes an instance of {kind.full}")
        value = self._meanings[kind.full].value
        return value.__new__(value)

    def _member(self, node: Made) -> Any:
        """Return `getattr(enum, name)`, or a function of torch; nothing else is looked up."""
        items = node.args.items
        kind, name = items if len(items) == 2 else (None, None)
        if isinstance(kind, Name) and isinstance(name, str):
            if kind.full in FUNCTION_PLACES:
                function = held_function(f"{kind.full}.{name}")
                if function is not None:
                    return function
            found = self._meanings[kind.full].value
            if isinstance(found, type) and issubclass(found, enum.Enum):
                if name not in found.__members__:
                    raise CheckpointError(
                        f"names {found.__qualname__}.{name}, which is no member of that Enum"
                    )
                return found[name]
        raise CheckpointError(NO_LOOKUP)

    # -- changing --------------------------------------------------------------------------------

    def _change(self, event: Event) -> None:
        target = self._made[id(event.node)]
        if event.kind == "append":
            items = self._all(event.content)
            if isinstance(target, set):
                target.update(map(hashable, items))
            elif isinstance(target, list):
                list.extend(target, items)
            elif isinstance(target, deque):
                target.extend(items)
            else:
                raise CheckpointError(f"appends to a {type(target).__name__}")
        elif event.kind == "set":
            if not isinstance(target, dict):
                raise CheckpointError(f"sets items of a {type(target).__name__}")
            ordered = isinstance(target, OrderedDict)
            put = OrderedDict.__setitem__ if ordered else dict.__setitem__
            is_state = id(event.node) in self.judgement.saved_states
            for key, value in event.content:
                if is_state and key == "class" and isinstance(value, Name):
                    # The class of an instance that is written as data; it is not kept.
                    put(target, key, self._meanings[value.full].value)
                else:
                    put(target, hashable(self.real(key)), self.real(value))
        else:
            made = self._give_state(target, self.real(event.content))
            self._made[id(event.node)] = made

    def _give_state(self, target: Any, state: Any) -> Any:
        if isinstance(target, functools.partial):
            _, args, kwargs, attributes = state
            if attributes or not all(isinstance(key, str) for key in kwargs or {}):
                raise CheckpointError("holds a functools.partial with attributes of its own")
            return functools.partial(target.func, *args, **(kwargs or {}))
        if isinstance(target, torch.Tensor):
            tensors.give_attributes(target, state)
            return target
        if isinstance(target, enum.Enum):
            raise CheckpointError("gives a state to a member of an Enum")
        if type(target).__module__.partition(".")[0] in _NATIVE and not isinstance(
            target, nn.Module
        ):
            return natives.give_state(target, state)
        if isinstance(target, nn.Module) and not (
            isinstance(state, dict) and all(isinstance(key, str) for key in state)
        ):
            raise CheckpointError(f"gives a {type(target).__name__} a state that is no dict")
        if hasattr(target, "__setstate__"):
            target.__setstate__(state)
            return target
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        for key, value in ((k, v) for part in parts if part for k, v in part.items()):
            if not isinstance(key, str) or callable(getattr(type(target), key, None)):
                raise CheckpointError(f"gives a {type(target).__name__} the attribute {key!r}")
            object.__setattr__(target, key, value)
        return target


_NATIVE = frozenset({"builtins", "collections", "argparse", "types", "numpy", "datetime"})


def _member_of_value(kind: Any, args: Sequence[Any], name: str) -> enum.Enum:
    """Return the member of an Enum that has a plain value; the Enum itself is never called."""
    if not (len(args) == 1 and _is_plain(args[0])):
        raise CheckpointError(f"calls {name}, which could run anything; an Enum has members")
    for member in kind:
        if type(member.value) is type(args[0]) and member.value == args[0]:
            return member  # type: ignore[no-any-return]  # of a class known at run time alone
    if issubclass(kind, enum.Flag) and type(args[0]) is int:
        members = [member for member in kind if member.value & args[0] == member.value]
        start = next(iter(kind), None)
        found = None if start is None else functools.reduce(operator.or_, members, start ^ start)
        if isinstance(found, kind) and found.value == args[0]:
            return found  # type: ignore[no-any-return]  # of a class known at run time alone
    raise CheckpointError(f"names {name}({args[0]!r}), which is no member of that Enum")


_PLAIN = (str, int, float, bool, bytes, type(None))


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Say whether comparing a value runs nothing: plain ones, and tuples of such."""
    if type(value) is tuple:
        return depth > 0 and all(_is_plain(part, depth - 1) for part in value)
    return isinstance(value, _PLAIN)


def hashable(key: Any, depth: int = 4) -> Any:
    """Return a key of a dict or a member of a set, if hashing it runs nothing and ends soon."""
    if isinstance(key, tuple | frozenset) and depth and len(key) <= 64:
        for part in key:
            hashable(part, depth - 1)
        return key
    if isinstance(key, (*_PLAIN, complex, enum.Enum, torch.dtype, torch.device)):
        return key
    if type(key).__module__.partition(".")[0] in ("numpy", "datetime", "pathlib", "decimal"):
        return key
    raise CheckpointError(f"has a {type(key).__name__} as the key of a dict or in a set")
