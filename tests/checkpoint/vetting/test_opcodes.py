"""A pickle becomes inert data; what no checkpoint needs is refused."""

from __future__ import annotations

import io
import pickle

import pytest

from rewrite.checkpoint.vetting.opcodes import DictOf, Made, Name, parse, walk
from rewrite.errors import CheckpointError


def test_calls_become_names():
    program = parse(io.BytesIO(b"cos\nsystem\n(S'x'\ntR."))
    assert isinstance(program.root, Made) and program.root.name == "os.system"
    assert [node.full for node in walk(program.root) if isinstance(node, Name)] == ["os.system"]


def test_plain_values_stay_what_they_are():
    root = parse(io.BytesIO(pickle.dumps({"a": 1, "b": None}))).root
    assert isinstance(root, DictOf) and root.pairs == [("a", 1), ("b", None)]


@pytest.mark.parametrize("data", [b"", b"}", b"j\xff\xff\xff\x7f.", b"(S'x'\nios\nsystem\n."])
def test_what_is_no_checkpoint(data):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        parse(io.BytesIO(data))
