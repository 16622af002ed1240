"""What a file cannot hold is refused by the name of the attribute that has it."""

from __future__ import annotations

import re
import threading
import types
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rewrite.checkpoint.culprit import culprit
from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError
from tests.checkpoint.files import same, small

HELD: dict[str, Any] = {
    "a lambda in a dict": defaultdict(lambda: 3),
    "a pattern": re.compile("a"),
    "a generator": torch.Generator(),
    "a lock": threading.Lock(),
    "a mapping": types.MappingProxyType({}),
    "a memory format": torch.channels_last,
    "an object": object(),
    "an operator": torch.ops.aten.add.Tensor,
    "a method of a tensor": torch.ones(2).abs,
    "objects": np.array([1, "a"], object),
    "fields": np.zeros(2, [("a", "f4")]),
    "bytes": torch.ones(2).untyped_storage(),
    "a module in a set": {nn.ReLU()},
    "a class": int | None,
}


@pytest.mark.parametrize("name", HELD)
def test_the_attribute_is_named_and_nothing_is_written(tmp_path, name) -> None:
    model = small()
    model[1].before = [1]
    model[1].held = HELD[name]
    with pytest.raises(CheckpointError, match=r"^1\.held: ") as caught:
        save(model, tmp_path / "m.pt")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    del model[1].held
    assert same(load(save(model, tmp_path / "m.pt")), model)


def test_nothing_is_named_where_no_attribute_alone_is_the_reason() -> None:
    model = small()
    tried = []
    assert culprit(model, lambda part: tried.append(part) is not None) is None
    assert tried and not any(part is model for part in tried)


def test_the_first_that_fails_is_named() -> None:
    model = small()
    model[0].register_buffer("odd", torch.ones(2).to_sparse())
    model[2].odd = -3
    assert culprit(model, lambda part: isinstance(part.held, torch.Tensor)) == "0.odd"
    assert culprit(model, lambda part: type(part.held) is int and part.held < 0) == "2.odd"
