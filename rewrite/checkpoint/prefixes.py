"""Detect and strip the key prefixes that training wrappers add to a state dict.

    keys of the model = {key without the prefix},    for exactly one prefix of the file's keys

Wrappers (DataParallel, FSDP, torch.compile) put theirs, and so do Lightning ("model."), SWA
("module.") and ema_pytorch ("ema_model."). What stands beside the prefix is no part of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from rewrite.errors import CheckpointError
from rewrite.text.some import some

_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What compilation, sharding and checkpointing put anywhere into a key."""

_LEADING = "module."


def fit_prefix(
    state: Mapping[str, Tensor],
    fits: Callable[[Mapping[str, Tensor]], bool],
    keys: Collection[str],
    note: Callable[[str], None],
    prefix: str | None = None,
) -> Mapping[str, Tensor]:
    """Return the entries of a state dict that are a model's, without what stands before the keys.

    Args:
        state: The state dict of a file.
        fits: Whether keys are all that the model needs.
        keys: Some keys that the model certainly has.
        note: Takes what was taken off or left out, in words.
        prefix: What to take off; found by itself where it is None.

    Raises:
        CheckpointError: no key begins with `prefix`, or several prefixes would do.
    """
    if prefix is not None:
        if not any(name.startswith(prefix) for name in state):
            raise CheckpointError(f"has no key that begins with {prefix!r}")
        return _stripped(state, prefix, note)
    if fits(state):
        return state
    bare = without_wrappers(state, note)
    if fits(bare):
        return bare
    ends = {name.removesuffix(key) for key in keys for name in bare if name.endswith(f".{key}")}
    found = sorted(candidate for candidate in ends if fits(_under(bare, candidate)))
    if len(found) > 1:
        raise CheckpointError(
            f"holds several models under the prefixes {', '.join(found)}; choose one with "
            "--strip-prefix PREFIX"
        )
    return _stripped(bare, found[0], note) if found else bare


def without_wrappers(
    state: Mapping[str, Tensor], note: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """Return a state dict without the prefixes that DataParallel, FSDP and torch.compile put."""
    names = [_WRAPPERS.sub("", name) for name in state]
    changed = names != list(state) and len(set(names)) == len(names)
    made: dict[str, Tensor] = (
        _with_versions(dict(zip(names, state.values(), strict=True)), state, _bare)
        if changed
        else state
        if isinstance(state, dict)
        else dict(state)
    )
    if changed:
        taken = {match for name in state for match in _WRAPPERS.findall(name)}
        note(f"took {', '.join(sorted(taken))} out of the keys")
    while made and all(name.startswith(_LEADING) for name in made):
        made = _stripped(made, _LEADING, note)
    return made


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _stripped(
    state: Mapping[str, Tensor], prefix: str, note: Callable[[str], None]
) -> dict[str, Tensor]:
    left = [name for name in state if not name.startswith(prefix)]
    beside = f", and left {len(left)} keys beside it out ({some(left)})" if left else ""
    note(f"took {prefix} off the keys{beside}")
    return _with_versions(
        _under(state, prefix), state, lambda name: f"{name}.".removeprefix(prefix).strip(".")
    )


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", f"{name}.").strip(".")


def _with_versions(
    made: dict[str, Tensor], state: Mapping[str, Tensor], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    versions: Mapping[str, Any] = getattr(state, "_metadata", {})
    return WithVersions(made, {rename(key): value for key, value in versions.items()})


class WithVersions(dict[str, Tensor]):
    """A state dict with the versions of the modules that wrote it, as torch keeps them."""

    def __init__(self, state: Mapping[str, Tensor], versions: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._metadata = dict(versions)


def needed(keys: Iterable[str], ties: Collection[Collection[str]]) -> list[frozenset[str]]:
    """Return what a state dict must have of a model's keys: one of each set."""
    tied = {key: frozenset(names) for names in ties for key in names}
    groups = {tied.get(key, frozenset((key,))) for key in keys}
    # torch 0.4 had no counter, and no model needs one.
    return [
        group for group in groups
        if not any(key.endswith(("num_batches_tracked", "_extra_state")) for key in group)
    ]  # fmt: skip
