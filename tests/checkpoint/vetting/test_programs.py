"""Both formats of torch.save are read up to their pickle."""

from __future__ import annotations

import io

import pytest
import torch

from rewrite.checkpoint.archive import Archive
from rewrite.checkpoint.vetting.opcodes import DictOf
from rewrite.checkpoint.vetting.programs import archived_program, parse_legacy
from rewrite.errors import CheckpointError


def saved(*, zipped):
    data = io.BytesIO()
    torch.save({"w": torch.ones(2)}, data, _use_new_zipfile_serialization=zipped)
    data.seek(0)
    return data


def test_both_formats_hold_the_same_names():
    new = archived_program(Archive(saved(zipped=True))).root
    old, keys = parse_legacy(saved(zipped=False))
    assert isinstance(new, DictOf) and isinstance(old.root, DictOf)
    assert new.pairs[0][0] == old.root.pairs[0][0] == "w"
    assert len(keys) == 1


def test_one_pickle_alone_is_no_file_of_the_older_format():
    with pytest.raises(CheckpointError, match="no checkpoint"):
        parse_legacy(io.BytesIO(b"K\x01." * 3))
