"""Inputs from text and from files; what is wrong with them is one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rewrite.errors import VerificationError
from rewrite.runtime.stored.input_files import load_inputs, parse_shapes


def test_shapes_are_parsed():
    x, ids = parse_shapes("1x3x8x8,2x5:int64")
    assert tuple(x.shape) == (1, 3, 8, 8)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("text", ["", "3xx", "axb", "1x3:nothing", "1x-3"])
def test_a_wrong_shape_is_one_clear_line(text):
    with pytest.raises(VerificationError, match="write it as 1x3x224x224") as error:
        parse_shapes(text)
    assert "\n" not in str(error.value)


def test_files_are_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.zeros(3))
    torch.save((torch.ones(4),), tmp_path / "x.pt")
    assert load_inputs(str(tmp_path / "x.npy"))[0].shape == (2, 3)
    assert len(load_inputs(str(tmp_path / "x.npz"))) == 2
    assert load_inputs(str(tmp_path / "x.pt"))[0].shape == (4,)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt"])
def test_a_broken_file_of_inputs_is_one_clear_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(VerificationError, match=name) as error:
        load_inputs(str(tmp_path / name))
    assert "\n" not in str(error.value)
