"""The shards of a new folder, written tensor by tensor in any order.

Types and shapes are known beforehand, so each shard gets its head and its full size at once, and a
tensor is written at its place when it is computed. What nobody rewrites is copied as bytes. A shard
that is whole is flushed while the next ones are computed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from rewrite.files.safetensors_header import Entry, header_of
from rewrite.hub.folder import CheckpointFolder
from rewrite.hub.form import CONFIG, INDEX
from rewrite.hub.safetensors_file import DTYPES, bytes_of, copy_range
from rewrite.progress import Countdown
from rewrite.sharded.plan import Made

NEW_SHARD = "model-rewritten.safetensors"
"""Where tensors go that the old folder has not, if it has an index."""


class FolderWriter:
    """The new folder while it is written.

    Args:
        folder: the old one.
        stage: an empty folder.
        made: what will be written, by name.
        gone: what the new folder has not.
        config: the new configuration.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        stage: Path,
        made: Mapping[str, Made],
        gone: Collection[str],
        config: Mapping[str, Any],
    ) -> None:
        self._folder, self._stage, self._config = folder, stage, config
        self._made = dict(_parts_of(folder, made))
        parts = [folder.merged[n].parts if n in folder.merged else (n,) for n in gone]
        self._gone = {name for each in parts for name in each}
        # What was equal to a tensor that changes, and tied to it, would be another one now.
        changed = {*made, *gone}
        self._gone |= {copy for copy, first in folder.copies.items() if first in changed}
        self._gone -= self._made.keys()
        self._files: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._flushed: list[Future[None]] = []
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(1)
        self._entries: dict[str, tuple[str, int, Entry]] = {}
        self._places = {n: shard for n, shard in folder.places.items() if n not in self._gone}

    def __enter__(self) -> FolderWriter:
        for shard in self._folder.shards:
            if (contents := self._contents(shard)) or self._folder.index is None:
                self._open(shard, contents)
        old = {name for shard in self._folder.shards.values() for name in shard.entries}
        new = {name: made for name, made in self._made.items() if name not in old}
        if new and self._folder.index is not None:
            self._open(NEW_SHARD, {name: _sized(made) for name, made in new.items()})
        return self

    def __exit__(self, *raised: object) -> None:
        self._disk.shutdown(cancel_futures=True)
        for handle in self._files.values():
            os.close(handle)

    def _contents(self, shard: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Return what a shard of the new folder holds, in the order of the old one."""
        found = {}
        for name, entry in self._folder.shards[shard].entries.items():
            if name in self._gone:
                continue
            made = self._made.get(name)
            found[name] = (entry.dtype, entry.shape, entry.size) if made is None else _sized(made)
        if self._folder.index is None:
            found |= {name: _sized(made) for name, made in self._made.items() if name not in found}
        return found

    def _open(self, shard: str, contents: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
        old = self._folder.shards.get(shard)
        metadata = {"format": "pt"} if old is None else old.header.metadata
        head, entries = header_of(contents, metadata)
        handle = os.open(self._stage / shard, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o644)
        self._files[shard] = handle
        os.pwrite(handle, head, 0)
        size = len(head) + sum(entry.size for entry in entries.values())
        if hasattr(os, "posix_fallocate") and size:
            # Room is taken now: a full disk is known before anything is computed.
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
        self._left[shard] = sum(entry.size for entry in entries.values())
        for name, entry in entries.items():
            self._entries[name] = (shard, len(head), entry)
            self._places[name] = shard

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place, or each of its parts."""
        if name in self._folder.merged:
            for part, values in self._folder.merged[name].split(tensor, self._folder.entry):
                self.put(part, values)
            return
        content = bytes_of(tensor)
        assert len(content) == self._entries[name][2].size
        self.write(name, content, 0)

    def write(self, name: str, content: memoryview, begin: int) -> None:
        """Write bytes of one tensor, which stands in the new folder as it is, from `begin` on."""
        shard, data, entry = self._entries[name]
        at, size = data + entry.begin + begin, len(content)
        while content:
            done = os.pwrite(self._files[shard], content[: 1 << 26], at)
            content, at = content[done:], at + done
        self._wrote(shard, size)

    def _wrote(self, shard: str, size: int) -> None:
        """Let a shard go to the disk once it is whole, while the next ones are computed."""
        with self._lock:
            before, self._left[shard] = self._left[shard], self._left[shard] - size
            if self._left[shard] <= 0 < before:
                self._flushed.append(self._disk.submit(os.fsync, self._files[shard]))

    def copy_rest(self, progress: Callable[[str], None]) -> None:
        """Copy every tensor that nobody rewrites, in runs of neighbours."""
        shards = self._folder.shards
        step = Countdown(progress, "copying", len(shards))
        for shard, old in shards.items():
            step(shard)
            if shard not in self._files:
                continue  # all of its tensors are gone
            source = os.open(old.path, os.O_RDONLY)
            try:
                for begin, length, at in self._runs(shard):
                    copy_range(source, self._files[shard], begin, length, at)
                    self._wrote(shard, length)
            finally:
                os.close(source)

    def _runs(self, shard: str) -> list[tuple[int, int, int]]:
        """Return (begin in the old file, length, begin in the new one) of each run to copy."""
        old = self._folder.shards[shard]
        runs: list[tuple[int, int, int]] = []
        for name, entry in old.entries.items():
            if name in self._made or name in self._gone or not entry.size:
                continue
            _, data, mine = self._entries[name]
            begin, at = old.data + entry.begin, data + mine.begin
            if runs and (runs[-1][0] + runs[-1][1], runs[-1][2] + runs[-1][1]) == (begin, at):
                runs[-1] = (runs[-1][0], runs[-1][1] + entry.size, runs[-1][2])
            else:
                runs.append((begin, entry.size, at))
        return runs

    def _more_parameters(self) -> int:
        """Return how many numbers the new folder holds more than the old one."""
        old = [e for shard in self._folder.shards.values() for e in shard.entries.values()]
        new = [entry for _, _, entry in self._entries.values()]
        return sum(math.prod(e.shape) for e in new) - sum(math.prod(e.shape) for e in old)

    def write_rest(self) -> None:
        """Write the configuration and the index, and copy everything else.

        Raises:
            OSError: the disk refuses something of all that was written.
        """
        (self._stage / CONFIG).write_text(_text(self._config), encoding="utf-8")
        if self._folder.index is not None:
            total = sum(entry.size for _, _, entry in self._entries.values())
            metadata = {**(self._folder.index.get("metadata") or {}), "total_size": total}
            if "total_parameters" in metadata:
                metadata["total_parameters"] += self._more_parameters()
            index = {
                **self._folder.index,
                "metadata": metadata,
                "weight_map": dict(sorted(self._places.items())),
            }
            (self._stage / INDEX).write_text(_text(index), encoding="utf-8")
        for path in self._folder.others():
            place = self._stage / path.relative_to(self._folder.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
        for flushed in self._flushed:
            flushed.result()


def _parts_of(folder: CheckpointFolder, made: Mapping[str, Made]) -> Iterator[tuple[str, Made]]:
    """Yield what is written, as it stands in the folder."""
    for name, held in made.items():
        if name not in folder.merged:
            yield name, held
            continue
        for part in folder.merged[name].parts:
            yield part, Made(held.dtype, folder.entry(part).shape)


def _sized(made: Made) -> tuple[str, tuple[int, ...], int]:
    width = DTYPES[made.dtype].itemsize
    return made.dtype, made.shape, width * math.prod(made.shape)


def _text(held: Mapping[str, Any]) -> str:
    return json.dumps(held, indent=2) + "\n"
