"""Made-up inputs: of what a graph declares, one number for one symbol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from rewrite.errors import VerificationError
from rewrite.onnx.vetting.made_up import check_shape, random_feed, synthetic_feeds

PLACE = Path("net.onnx")
value = helper.make_tensor_value_info


def test_a_symbol_is_one_number_and_the_first_axis_is_a_batch_of_one() -> None:
    inputs = [
        value("image", TensorProto.FLOAT, [None, 3, "side", "side"]),
        value("ids", TensorProto.INT64, ["batch", "length"]),
        value("mask", TensorProto.BOOL, ["batch", "length"]),
    ]
    shapes = [{n: a.shape for n, a in feed.items()} for feed in synthetic_feeds(PLACE, inputs)]
    assert shapes[0] == {"image": (1, 3, 64, 64), "ids": (1, 16), "mask": (1, 16)}
    assert {"image": (1, 3, 224, 224), "ids": (1, 512), "mask": (1, 512)} in shapes


def test_types_are_those_that_are_declared_and_a_seed_repeats() -> None:
    inputs = [value("x", TensorProto.FLOAT16, [2]), value("i", TensorProto.INT32, [3])]
    one, two = (random_feed(PLACE, inputs, [[2], [3]], seed=5) for _ in range(2))
    assert (one["x"].dtype, one["i"].dtype) == (np.float16, np.int32)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_does_not_fit_into_memory_is_one_line() -> None:
    with pytest.raises(VerificationError, match="input x of 1000000x1000000 would take 3725 GiB"):
        next(synthetic_feeds(PLACE, [value("x", TensorProto.FLOAT, [10**6, 10**6])]))


@pytest.mark.parametrize("shape", [(2, 3), (7, 3)])
def test_a_free_axis_takes_every_size_and_a_fixed_one_its_own(shape) -> None:
    declared = value("x", TensorProto.FLOAT, ["n", 3])
    check_shape(PLACE, declared, shape)
    with pytest.raises(VerificationError, match="input x is nx3, not 2x4"):
        check_shape(PLACE, declared, (2, 4))
