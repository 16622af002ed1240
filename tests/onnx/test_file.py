"""An ONNX file from any source: read whole, or refused in one clear line."""

from __future__ import annotations

import pytest

from rewrite.equivalence.verification import Level
from rewrite.errors import VerificationError
from rewrite.onnx.verify import verify_onnx
from tests.onnx.graphs import (
    BAD,
    X,
    external,
)


def test_external_data_is_read(tmp_path, net):
    assert verify_onnx(external(tmp_path, net), net, X, level=Level.QUICK).ok


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_file_is_one_clear_line(tmp_path, net, make):
    path = make(tmp_path, net)
    with pytest.raises(VerificationError, match=BAD[make]) as error:
        verify_onnx(path, net, X)
    assert "\n" not in str(error.value)
