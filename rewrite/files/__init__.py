"""Files that are written completely or not at all, and those of one command together."""

from rewrite.files.reading import is_folder, is_there, named_twice, no_file
from rewrite.files.scratch import removed_if_killed, scratch_folder
from rewrite.files.staging import (
    Publication,
    atomic_path,
    check_writable,
    publication,
    publish_folder,
    together,
    write_bytes,
)

__all__ = [
    "Publication",
    "atomic_path",
    "check_writable",
    "is_folder",
    "is_there",
    "named_twice",
    "no_file",
    "publication",
    "publish_folder",
    "removed_if_killed",
    "scratch_folder",
    "together",
    "write_bytes",
]
