"""Lines that write in place, found by their spelling alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite.functional.untraced_writes import untraced_writes


class Writes(nn.Module):
    def forward(self, x: Tensor, count: int = 0) -> Tensor:
        count += 1
        x += x
        x[:, 0] = 0
        x.clamp_(0)
        torch.add(x, x, out=x)
        y = torch.relu(x).requires_grad_(False)
        y = nn.functional.relu(y, inplace=False)
        return nn.functional.relu(y, inplace=True)


def test_each_line_that_writes_is_named_once_with_its_text() -> None:
    found = list(untraced_writes(Writes()))
    assert [each.text for each in found] == [
        "x += x", "x[:, 0] = 0", "x.clamp_(0)", "torch.add(x, x, out=x)",
        "return nn.functional.relu(y, inplace=True)",
    ]  # fmt: skip
    first = Writes.forward.__code__.co_firstlineno
    assert [int(each.place.rpartition(":")[2]) - first for each in found] == [2, 3, 4, 5, 8]
    assert all("test_untraced_writes.py:" in each.place for each in found)


def test_what_has_no_source_names_nothing() -> None:
    made: dict[str, type[nn.Module]] = {"Base": nn.Module}
    exec("class Made(Base):\n    def forward(self, x):\n        x += 1\n        return x", made)
    assert list(untraced_writes(made["Made"]())) == []
    assert list(untraced_writes(nn.Identity())) == []
