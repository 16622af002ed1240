"""Modules in the order in which data flows through them, whatever order they are registered in."""

from __future__ import annotations

import torch
from torch import nn

from rewrite.graph.capture import capture
from rewrite.graph.order import in_data_flow_order


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them; one is called never, one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.first(self.last(x)))


def test_the_first_call_of_a_module_says_where_it_stands() -> None:
    names = [name for name, _ in in_data_flow_order(capture(Backwards()))]
    called = [name for name in names if name in ("first.0", "first.1", "last", "unused")]
    assert called == ["first.0", "first.1", "last", "unused"]


class Gate(nn.Module):
    """A branch on a value: one call to the tracer, whose layers have regions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.after = nn.Linear(4, 4)
        self.gate = Gate()
        self.attention = nn.MultiheadAttention(4, 2)
        self.before = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(self.before(x))
        return self.after(self.attention(x, x, x)[0])


def test_what_only_an_opaque_module_calls_stands_right_behind_it() -> None:
    names = [name for name, _ in in_data_flow_order(capture(Late()))]
    assert names == [
        "", "before", "before.0", "before.1", "gate", "gate.one", "gate.other", "gate.other.0",
        "gate.other.1", "attention", "attention.out_proj", "after", "unused",
    ]  # fmt: skip


def test_a_root_that_cannot_be_traced_leaves_its_children_in_the_order_of_registration() -> None:
    names = [name for name, _ in in_data_flow_order(capture(Gate()))]
    assert names == ["", "one", "other", "other.0", "other.1"]


class Hooked(Late):
    def __init__(self) -> None:
        super().__init__()
        self.before.register_forward_hook(lambda module, args, output: None)


def test_a_module_that_a_hook_watches_is_entered_where_it_is_called() -> None:
    names = [name for name, _ in in_data_flow_order(capture(Hooked()))]
    assert names[:5] == ["", "before", "before.0", "before.1", "gate"] and names[-1] == "unused"


def test_each_module_is_listed_once_under_its_first_name() -> None:
    model = Late()
    model.alias = model.gate
    listed = in_data_flow_order(capture(model))
    assert [name for name, module in listed if module is model.gate] == ["gate"]
    assert len(listed) == len(list(model.modules()))
