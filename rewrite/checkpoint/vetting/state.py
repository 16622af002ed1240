"""Find the state dict, or the module, in a parsed checkpoint; everything stays inert.

checkpoint = {"state_dict": {...}, "optimizer": ..., "epoch": 3, "args": ...}
state dict = the mapping from names to tensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rewrite.checkpoint.vetting.opcodes import DictOf, ListOf, Made, Name, Node, TupleOf
from rewrite.errors import CheckpointError
from rewrite.text.some import some

TENSORS = frozenset(
    {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_qtensor",
        "torch._tensor._rebuild_from_type_v2",
        "torch.nn.parameter.UninitializedParameter",
    }
)
"""The functions by which torch pickles tensors."""

ARRAYS = frozenset({"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"})
"""The functions by which numpy pickles arrays."""

NESTED = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params"),
    *("model_ema", "ema", "state_dict_ema", "ema_state_dict", "params_ema"),
)
"""Where training checkpoints keep their state dict; the first that is there is taken."""


def is_tensor(value: Any) -> bool:
    """Say whether a node of a pickle is a tensor."""
    return isinstance(value, Made) and value.name in TENSORS


def is_array(value: Any) -> bool:
    """Say whether a node of a pickle is an array of numpy, as Detectron2 writes weights."""
    return isinstance(value, Made) and value.name in ARRAYS


def pairs_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Return the items of a dict of the pickle, None for anything else."""
    if isinstance(node, DictOf):
        return node.pairs
    if isinstance(node, Made) and node.name.startswith(("collections.", "omegaconf.")):
        first = node.args.items[0] if isinstance(node.args, TupleOf) and node.args.items else None
        given = [
            item.items for item in (first.items if isinstance(first, ListOf) else ())
            if isinstance(item, ListOf | TupleOf) and len(item.items) == 2
        ]  # fmt: skip
        return [(key, value) for key, value in given] + node.pairs
    return None


def is_module(node: Any) -> bool:
    """Say whether a node of the pickle is a module: something with parameters and children."""
    return isinstance(node, Made) and state_of(node) is not None


def find_state(root: Any, key: str | None = None) -> tuple[str, Any] | None:
    """Return where the state dict of a checkpoint is, and its node; None where there is none.

    Raises:
        CheckpointError: there are several, or none is called `key`.
    """
    if key is not None:
        node = _at(root, key)
        for is_state in (_is_state, _is_mixed_state):
            found = _search(node, key, is_state) if node is not None else None
            if found is not None:
                return found
        known = ", ".join(place for place, _ in _all_states(root, "", _is_state)) or "none"
        raise CheckpointError(f"has no state dict called {key}; those in it: {known}")
    others: list[tuple[str, Any]] = []
    for is_state in (_is_state, _is_mixed_state):
        found = _search(root, "", is_state)
        if found is not None:
            return found
        others = list(_all_states(root, "", is_state))
        if others:
            break
    if len(others) > 1:
        names = ", ".join(place for place, _ in others)
        raise CheckpointError(f"holds several state dicts ({names}); choose one with --key NAME")
    return others[0] if others else None


def _at(root: Any, key: str) -> Any:
    """Return the node under a key, or under keys with dots between them."""
    pairs = {str(name): value for name, value in pairs_of(root) or ()}
    if key in pairs:
        return pairs[key]
    first, _, rest = key.partition(".")
    return _at(pairs[first], rest) if rest and first in pairs else None


def _search(
    node: Any, place: str, is_state: Callable[[Any], bool], depth: int = 0
) -> tuple[str, Any] | None:
    """Return the state dict, or the module, that a node is or nests under a usual name."""
    if is_module(node) or is_state(node):
        return place, node
    pairs = {str(key): value for key, value in pairs_of(node) or ()}
    for key in NESTED if depth < 4 else ():
        if key not in pairs:
            continue
        found = _search(pairs[key], f"{place}.{key}".strip("."), is_state, depth + 1)
        if found is not None:
            return found
    return None


def _is_state(node: Any) -> bool:
    pairs = pairs_of(node)
    return bool(pairs) and all(isinstance(k, str) and is_tensor(v) for k, v in pairs or ())


def _is_mixed_state(node: Any) -> bool:
    """Say whether most of a dict are tensors or arrays by dotted names: beside them a version.

    Looked for where nothing else is there: a checkpoint may keep a few tensors of other meaning.
    """
    pairs = pairs_of(node) or ()
    held = [key for key, value in pairs if is_tensor(value) or is_array(value)]
    named = [key for key in held if isinstance(key, str) and "." in key]
    return bool(named) and 2 * len(named) > len(pairs)


def _all_states(
    node: Any, place: str, is_state: Callable[[Any], bool], depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Yield every state dict and module below a node, but for those of optimizers."""
    if place and (is_module(node) or is_state(node)):
        yield place, node
        return
    for key, value in pairs_of(node) or () if depth < 4 else ():
        if isinstance(key, str) and not key.startswith("optim"):
            yield from _all_states(value, f"{place}.{key}".strip("."), is_state, depth + 1)


def left_out(root: Any, place: str) -> tuple[str, ...]:
    """Return the entries of a checkpoint that are no part of its state dict, each with what it is.

    Those beside it, and those in it that are no tensors.
    """
    first = place.partition(".")[0]
    beside = [pair for pair in pairs_of(root) or () if place and pair[0] != first]
    inside = pairs_of(_at(root, place) if place else root) or ()
    return tuple(
        f"{key} ({describe_node(value)})"
        for key, value in [*beside, *(p for p in inside if not (is_tensor(p[1]) or is_array(p[1])))]
        if isinstance(key, str)
    )


def describe_node(node: Any) -> str:
    """Say in a word or two what a node of the pickle is."""
    if not isinstance(node, Node):
        return type(node).__name__
    if isinstance(node, Made):
        return "tensor" if is_tensor(node) else node.name.rpartition(".")[2] or "object"
    if isinstance(node, Name):
        return node.full
    return {"ListOf": "list", "TupleOf": "tuple", "DictOf": "dict"}.get(
        type(node).__name__, "object"
    )


def state_of(node: Made) -> dict[str, Any] | None:
    """Return the attributes of a module, None for what is no module."""
    for state in node.states:
        found = {str(key): value for key, value in pairs_of(state) or ()}
        if "_modules" not in found and "state" in found:
            found = {str(key): value for key, value in pairs_of(found["state"]) or ()}
        if "_modules" in found and "_parameters" in found:
            return found
    return None


def describe_root(root: Any) -> str:
    """Say in a few words what a checkpoint is that holds no state dict."""
    pairs = pairs_of(root)
    if pairs is not None:
        keys = [describe_node(key) if isinstance(key, Node) else str(key) for key, _ in pairs]
        return f"a dict with the keys {some(keys, 6) or '(none)'}"
    return f"a {'Tensor' if is_tensor(root) else describe_node(root)}"
