"""Judge the modules of a parsed pickle by their states, before any of them is built.

every name of a child, parameter or buffer is [\\w-]+
no attribute bears the name of a method of `nn.Module`
modules contain each other without a circle, at most 200 deep
a set is made of a list                                    a range of 10^9 is none
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rewrite.checkpoint.vetting.names import FUNCTION_PLACES, may_have_meaning, values
from rewrite.checkpoint.vetting.opcodes import Made, Name, Node, TupleOf
from rewrite.checkpoint.vetting.state import pairs_of, state_of
from rewrite.errors import CheckpointError

NAME = re.compile(r"[\w-]+")
DEEPEST = 200
"""How deep modules may be nested."""


def check_name(name: Any, place: str, among: str) -> None:
    """Raise CheckpointError for a name that would be more than a name in generated source."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise CheckpointError(f"{place}: has the name {name!r} among its {among}")


def check_nodes(nodes: Iterable[Node]) -> None:
    """Raise CheckpointError for calls that take memory by a number, and for circles of modules."""
    modules = []
    for node in nodes:
        if not isinstance(node, Made):
            continue
        if node.name in ("builtins.set", "builtins.frozenset"):
            _check_set(node)
        elif node.name == "builtins.getattr":
            _check_lookup(node)
        elif node.name == "functools.partial":
            _check_partial(node)
        if state_of(node) is not None:
            modules.append(node)
    done: set[int] = set()
    for module in modules:
        if id(module) not in done:
            _check_module(module, done)


def _check_set(node: Made) -> None:
    args = node.args.items if isinstance(node.args, TupleOf) else ()
    is_range = bool(args) and isinstance(args[0], Made) and args[0].name == "builtins.range"
    if len(args) > 1 or is_range or (args and not isinstance(args[0], Node)):
        raise CheckpointError("makes a set of what is no list")


def _check_partial(node: Made) -> None:
    items = node.args.items if isinstance(node.args, TupleOf) else ()
    if not (items and isinstance(items[0], Name)):
        raise CheckpointError("holds a functools.partial of something that is no allowed name")


NO_LOOKUP = "names builtins.getattr, which no model needs and no --trust allows"


def _check_lookup(node: Made) -> None:
    """Raise CheckpointError unless it looks up a listed function, or a member of an Enum."""
    items = node.args.items if isinstance(node.args, TupleOf) else ()
    place, name = items if len(items) == 2 else (None, None)
    if not (isinstance(place, Name) and isinstance(name, str)):
        raise CheckpointError(NO_LOOKUP)
    if place.full in FUNCTION_PLACES and not may_have_meaning(f"{place.full}.{name}"):
        raise CheckpointError(NO_LOOKUP)


def _check_module(root: Made, done: set[int]) -> None:
    """Judge the names of a module and of all below it that is not done; none contains itself."""
    stack = [(root, _children(root, "the model"))]
    open_ = {id(root)}
    while stack:
        node, waiting = stack[-1]
        if not waiting:
            stack.pop()
            open_.discard(id(node))
            done.add(id(node))
            continue
        place, child = waiting.pop()
        if id(child) in open_:
            kind = child.name.rpartition(".")[2]
            raise CheckpointError(f"holds a {kind} that contains itself")
        if id(child) in done:
            continue
        open_.add(id(child))
        stack.append((child, _children(child, place)))
        if len(stack) > DEEPEST:
            raise CheckpointError(f"holds modules that are nested more than {DEEPEST} deep")


def _children(module: Made, place: str) -> list[tuple[str, Made]]:
    """Return the children of a module with their places; judge the names in it."""
    state = state_of(module) or {}
    for key in ("_parameters", "_buffers", "_modules"):
        for name, _ in pairs_of(state.get(key)) or ():
            check_name(name, place, key.strip("_"))
    for name in state:
        if name in values("methods"):
            raise CheckpointError(f"{place}: has an attribute {name!r} in the place of a method")
    start = "" if place == "the model" else f"{place}."
    return [
        (f"{start}{name}", child)
        for name, child in pairs_of(state["_modules"]) or ()
        if isinstance(child, Made) and state_of(child) is not None
    ]
