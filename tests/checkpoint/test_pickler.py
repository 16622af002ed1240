"""What is written can be opened again."""

from __future__ import annotations

import functools
import json
import pathlib
import pickle

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError
from tests.checkpoint.files import refused_at_once

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def kinds():
    import collections
    import datetime
    import math
    import operator

    import numpy as np

    yield from (np.float64(2.0), np.int32(3), np.bool_(True), np.dtype("f4"), np.float32)
    yield from (np.arange(6.0).reshape(2, 3), np.array(["a", "bc"]), np.datetime64("2020-01-02"))
    yield from (pathlib.Path("a/b"), pathlib.PureWindowsPath("c"), datetime.date(2020, 1, 2))
    yield from (datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1), datetime.UTC)
    yield from (int, float, str, list, dict, type(None), object, complex, bytes)
    yield from (torch.tanh, torch.fft.rfft2, torch.nn.functional.gelu, torch.Tensor.relu)
    yield from (torch.special.gammaln, torch.linalg.norm, math.sqrt, operator.add, torch.bmm)
    yield from (torch.float16, torch.strided, torch.device("cpu"), torch.Size([1, 2]), 3 + 4j)
    yield from (b"abc", bytearray(b"x"), {1, 2}, frozenset({3}), range(4), slice(1, 2), Ellipsis)
    yield from (collections.OrderedDict(a=1), collections.defaultdict(list, b=[2]))
    yield from (collections.Counter("aab"), functools.partial(nn.LayerNorm, eps=1e-3), nn.GELU)
    yield from (torch.__version__, torch.ones(2), {"x": (1, "y")}, 2**70)


@pytest.mark.parametrize("value", list(kinds()), ids=lambda value: f"{value}"[:30])
@pytest.mark.parametrize("protocol", [2, 5])
def test_load_opens_every_attribute_that_save_writes(tmp_path, value, protocol):
    model = nn.Linear(2, 2)
    model.extra = value
    if protocol == 2:
        save(model, tmp_path / "m.pt")
    else:
        torch.save(model, tmp_path / "m.pt", pickle_protocol=5)
    back = load(tmp_path / "m.pt").extra
    if isinstance(value, functools.partial):
        assert (back.func, back.args, back.keywords) == (value.func, value.args, value.keywords)
        return
    assert type(back) is type(value)
    assert pickle.dumps(back) == pickle.dumps(value) or back is value or (back == value).all()


def test_what_load_could_not_open_is_not_written(tmp_path):
    model = nn.Linear(2, 2)
    model.options = {nn.Linear: 1}
    with pytest.raises(CheckpointError, match="key of a dict"):
        save(model, tmp_path / "m.pt")
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(json.dumps)
    assert list(tmp_path.iterdir()) == []
    save(hooked, tmp_path / "m.pt")
    refused_at_once(tmp_path / "m.pt", "json.dumps")
    load(tmp_path / "m.pt", trust=["json.dumps"])
