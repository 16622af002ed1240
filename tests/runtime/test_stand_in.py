"""A stand-in shares no state with the model: whatever a forward does lands on the copy."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rewrite.runtime.copying import lazy_copy
from rewrite.runtime.stand_in import Attributes, stand_in, without_values
from rewrite.runtime.tree import Tree


class Pair(NamedTuple):
    left: Any
    right: Any


class Holds(nn.Module):
    """Holds its layers in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.fc.weight
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.ones(3)
        self.cache: dict[str, Any] = {}
        self.log: list[Any] = [self.fc]
        self.queue = deque([1], maxlen=2)
        self.ordered = OrderedDict(a=[1])
        self.default = defaultdict(list, a=[1])
        self.pair = Pair(self.fc, [1])
        self.partial = functools.partial(self.method, self.fc)
        self.lock = threading.Lock()
        layer = self.fc
        self.closure = lambda x: layer(x)

    def method(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.plain.add_(1)
        self.cache["x"] = x
        self.log.append(x)
        self.queue.append(2)
        self.ordered["a"].append(2)
        self.default["b"].append(2)
        self.pair.right.append(2)
        self.extra = x
        self.fc.weight.data.zero_()
        return self.fc(x)


def copied(model: nn.Module) -> Any:
    return stand_in(Tree(model), lambda t: t.detach().clone(), lambda t: t.clone())


def test_whatever_a_forward_does_lands_on_the_copy() -> None:
    model = Holds()
    weight = model.fc.weight.detach().clone()
    made = copied(model)
    made(torch.randn(2, 3))
    assert torch.equal(model.fc.weight, weight) and model.count == 0 and model.plain.sum() == 3
    assert model.cache == {} and model.log == [model.fc] and list(model.queue) == [1]
    assert model.ordered == {"a": [1]} and dict(model.default) == {"a": [1]}
    assert model.pair.right == [1] and not hasattr(model, "extra")
    assert made.count == 1 and made.cache and not made.fc.weight.any()


def test_what_was_one_object_is_one_object_in_the_copy() -> None:
    made = copied(Holds())
    assert made.log[0] is made.fc and made.pair.left is made.fc
    assert made.tied.weight is made.fc.weight
    assert made.partial.args[0] is made.fc and made.partial.func.__self__ is made


def test_closures_hold_the_copies() -> None:
    model = Holds()
    made = copied(model)
    with torch.no_grad():
        made.fc.weight.zero_()
        made.fc.bias.zero_()
    assert not made.closure(torch.ones(1, 3)).any() and model.closure(torch.ones(1, 3)).any()


def test_kinds_of_containers_stay() -> None:
    model = Holds()
    made = copied(model)
    for name in ("queue", "ordered", "default", "pair", "partial"):
        assert type(getattr(made, name)) is type(getattr(model, name)), name
    assert made.queue.maxlen == 2 and made.default.default_factory is list
    assert made.lock is model.lock, "what nothing can copy is shared"
    assert type(made) is Holds and dict(made.named_parameters()).keys() == {
        "fc.weight", "fc.bias", "tied.bias"
    }  # fmt: skip


def test_a_deep_chain_of_modules_needs_no_deep_stack() -> None:
    model = nn.Sequential()
    for _ in range(3000):
        model = nn.Sequential(model)
    assert len(list(Tree(copied(model)).modules())) == 3001


def test_tensors_without_values_keep_shape_dtype_strides_and_kind() -> None:
    parameter = nn.Parameter(torch.randn(4, 3).T, requires_grad=False)
    made = without_values(parameter)
    assert isinstance(made, nn.Parameter) and made.is_meta and not made.requires_grad
    assert (made.shape, made.stride(), made.dtype) == ((3, 4), (1, 3), torch.float32)
    assert not isinstance(without_values(torch.ones(2)), nn.Parameter)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
)
def test_tensors_that_meta_cannot_stand_for_are_copied(tensor: Tensor) -> None:
    made = without_values(tensor)
    assert made is not tensor and made.layout is tensor.layout and made.dtype is tensor.dtype


# -- attributes that are put back -----------------------------------------------------------------


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items, self.table = [1, 2], {"a": 1}
        self.number, self.held, self.written = 0, torch.ones(2), torch.ones(2)

    def change(self) -> None:
        self.items.reverse()
        self.table.pop("a")
        self.table["b"] = 2
        self.number, self.new = 1, 3
        self.written.add_(1)


def test_attributes_and_what_their_containers_held_are_put_back() -> None:
    module = Writes()
    items, table = module.items, module.table
    before = Attributes([module])
    module.change()
    before.put_back()
    assert module.items is items == [1, 2] and module.table is table == {"a": 1}
    assert module.number == 0 and not hasattr(module, "new")


def test_some_of_the_modules_can_be_put_back_alone() -> None:
    one, other = Writes(), Writes()
    before = Attributes([one])
    before.add(other)
    one.change()
    other.change()
    before.add(other)  # remembered as it was first
    before.put_back([other])
    assert one.number == 1 and other.number == 0 and other.items == [1, 2]


def test_tensors_that_nothing_wrote_or_exchanged_are_told() -> None:
    module = Writes()
    before = Attributes([module])
    assert before.unchanged() == {id(module.held), id(module.written)}
    module.change()
    assert before.unchanged() == {id(module.held)}
    module.held = torch.ones(2)
    assert before.unchanged() == set()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_mode_of_torchscript_does_not_reach_the_model() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), scripted).eval()
    copied = stand_in(Tree(model), without_values, lazy_copy)
    copied.train()
    assert not scripted.training and not any(m.training for m in scripted.modules())
    assert copied.get_submodule("1").training
