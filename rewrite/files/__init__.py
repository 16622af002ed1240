"""Files that are written completely or not at all, and those of one command together."""

from rewrite.files.staging import (
    Publication,
    atomic_path,
    check_writable,
    publication,
    publish_folder,
    removed_if_killed,
    together,
    write_bytes,
)

__all__ = [
    "Publication",
    "atomic_path",
    "check_writable",
    "publication",
    "publish_folder",
    "removed_if_killed",
    "together",
    "write_bytes",
]
