"""Judge a file as far as that needs no torch: what is refused here costs milliseconds.

    file = archive | older format | safetensors        by what is in it
    structure -> parts -> names -> where the state dict is

What passes is opened by `rewrite.checkpoint.load`, which calls the same functions and then judges
what only PyTorch can tell: what a name stands for, what a state does to its class.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rewrite.checkpoint.archive import Archive, opened
from rewrite.checkpoint.vetting.exported import vet_exported
from rewrite.checkpoint.vetting.files import check_file, is_exported
from rewrite.checkpoint.vetting.names import refuse_unless_allowed
from rewrite.checkpoint.vetting.opcodes import Made, Name, Node, Program
from rewrite.checkpoint.vetting.programs import archived_program, parse_legacy
from rewrite.checkpoint.vetting.state import describe_root, find_state, is_module, pairs_of
from rewrite.checkpoint.vetting.tree import check_nodes
from rewrite.errors import CheckpointError
from rewrite.files.safetensors_header import read_header


def vet(
    path: str | os.PathLike[str],
    *,
    factory: str | None = None,
    trust: Sequence[str] = (),
    key: str | None = None,
    state: bool = False,
) -> None:
    """Raise CheckpointError for a MODEL file that `load` would refuse, where that can be seen.

    Args:
        path: The file.
        factory: What builds the model of a state dict; with it, only tensors of the file matter.
        trust: Packages and full names that the file may name beside the lists.
        key: Where in a training checkpoint the state dict is.
        state: Whether a state dict will do without a factory.
    """
    place = Path(path)
    check_file(place)
    if place.suffix == ".safetensors":
        count = len(read_header(place).entries)
        if factory is None and not state:
            raise CheckpointError(f"{path}: {needs_factory(count)}")
        return
    with _named(path):
        if zipfile.is_zipfile(place) and is_exported(place):
            with opened(place) as stream:
                vet_exported(Archive(stream))
        else:
            with opened(place) as stream:
                _vet_model(_program(stream), factory, trust, key, state)


def vet_pickle(path: str | os.PathLike[str], trust: Sequence[str] = ()) -> None:
    """Raise CheckpointError for a file of inputs or data that may not be opened as a whole."""
    check_file(Path(path))
    with _named(path), opened(Path(path)) as stream:
        _check_names(_program(stream), trust)


def vet_safetensors(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for a safetensors file whose header is not what the file holds."""
    check_file(Path(path))
    read_header(Path(path))


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the path before what is wrong with its file."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from (
            error.__cause__
        )


def needs_factory(count: int, where: str = "") -> str:
    """Return what is said of a state dict without a factory."""
    return (
        f"is a state dict of {count} tensors{where}; say what "
        "builds the model with --factory package.module:callable"
    )


def _program(stream: IO[bytes]) -> Program:
    is_archive = stream.read(2) == b"PK"
    stream.seek(0)
    return archived_program(Archive(stream)) if is_archive else parse_legacy(stream)[0]


def _vet_model(
    program: Program, factory: str | None, trust: Sequence[str], key: str | None, state: bool
) -> None:
    found = find_state(program.root, key)
    if found is not None and (factory is not None or (state and not is_module(found[1]))):
        return
    try:
        _check_names(program, trust)
    except CheckpointError as error:
        if found is not None and is_module(found[1]):
            raise
        raise CheckpointError(f"{error}; with --factory only its tensors are opened") from error
    if found is None:
        raise CheckpointError(
            f"holds neither a model nor a state dict, but {describe_root(program.root)}"
        )
    place, node = found
    if not is_module(node):
        where = f" under {place!r}" if place else ""
        raise CheckpointError(needs_factory(len(pairs_of(node) or ()), where))


def _check_names(program: Program, trust: Sequence[str]) -> None:
    """Judge each name that is called or held, and then what is made of the modules."""
    nodes = [event.node for event in program.events]
    for name in used_names(nodes):
        refuse_unless_allowed(name.full, trust)
    check_nodes(nodes)


def used_names(nodes: Sequence[Node]) -> list[Name]:
    """Return the names that are called, or stand below another node."""
    used = {id(node.function) for node in nodes if isinstance(node, Made)}
    used |= {id(value) for node in nodes for value in node.held()}
    return [node for node in nodes if isinstance(node, Name) and id(node) in used]
