from __future__ import annotations

import math
import weakref
from collections import UserList
from functools import lru_cache, partial

import pytest
import torch
from torch import nn

import models
import rewrite
from rewrite.runtime.copying import copy_model, own_memory_
from rewrite.runtime.tree import Tree


class Holder(nn.Module):
    """Modules under attributes, in a list, in a tuple, in a nested dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again = self.first
        self.plain = [nn.Linear(2, 2), self.first]
        self.pair = (nn.ReLU(), nn.Linear(2, 3))
        self.table = {"a": {"b": nn.BatchNorm1d(3)}}
        self.library = math


def test_names_registered_and_hidden_modules() -> None:
    model = Holder()
    tree = Tree(model)
    assert tree.name(model.first) == "first"
    assert set(tree.aliases("first")) == {"again", "plain[1]"}
    assert tree.get("plain[0]") is model.plain[0]
    assert tree.get("table['a']['b']") is model.table["a"]["b"]
    assert [name for name, _ in tree.modules()] == [
        "", "first", "plain[0]", "pair[0]", "pair[1]", "table['a']['b']",
    ]  # fmt: skip


def test_replaces_under_every_name_and_in_plain_containers() -> None:
    model = Holder()
    tree = Tree(model)
    new, other, third = nn.Identity(), nn.Identity(), nn.Identity()
    tree.replace(model.first, new)
    tree.replace(model.pair[1], other)
    tree.replace(model.table["a"]["b"], third)
    assert model.first is model.again is model.plain[1] is new
    assert model.pair[1] is other and isinstance(model.pair, tuple)
    assert model.table["a"]["b"] is third
    assert tree.get("plain[1]") is new and tree.name(new) == "first"


def test_a_copy_shares_storage_until_somebody_writes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = copy_model(model)
    assert all(torch.equal(copied.state_dict()[name], value) for name, value in before.items())
    assert copied[0].weight is not model[0].weight
    with torch.no_grad():
        copied[0].weight.add_(1)
        copied[1].running_mean.add_(1)
        model[0].bias.add_(1)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert torch.equal(copied[0].bias, before["0.bias"])


def test_a_copy_shares_its_bytes() -> None:
    model = nn.Linear(64, 64)
    copied = copy_model(model)
    pointers = [torch._C._data_address(m.weight) for m in (model, copied)]
    assert pointers[0] == pointers[1]


def test_a_copy_keeps_ties_modes_and_what_cannot_be_pickled() -> None:
    model = Holder().train()
    model.first.weight = model.pair[1].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.first.eval()
    copied = copy_model(model)
    assert copied.first.weight is copied.pair[1].weight
    assert copied.first is copied.again is copied.plain[1]
    assert copied.library is math
    assert not copied.first.training and copied.pair[1].training
    assert not copied.first.weight.requires_grad


def test_a_copy_of_old_style_weight_norm() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.utils.weight_norm(nn.Linear(3, 3))
    model(torch.ones(1, 3))
    copied = copy_model(model)
    assert torch.equal(copied(torch.ones(2, 3)), model(torch.ones(2, 3)))


@pytest.mark.parametrize("name", models.all_models())
def test_every_reference_model_can_be_copied(name: str) -> None:
    model, _ = models.build(name)
    copied = copy_model(model)
    assert type(copied) is type(model) or isinstance(model, torch.fx.GraphModule)
    pairs = zip(model.state_dict().items(), copied.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert [m.training for m in model.modules()] == [m.training for m in copied.modules()]


def _from_a_file(tmp_path) -> nn.Module:
    torch.save(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), tmp_path / "m.pt")
    return torch.load(tmp_path / "m.pt", weights_only=False)


def test_what_was_read_from_a_file_can_be_copied_and_written(tmp_path) -> None:
    """Its storages have no allocator: shared copy-on-write, a write would crash the process."""
    model = _from_a_file(tmp_path)
    expected = model[0].weight.detach().clone()
    copied = copy_model(model)
    with torch.no_grad():
        model[0].weight.add_(1)
        copied[0].bias.add_(1)
    torch.save(copied, tmp_path / "copy.pt")
    assert torch.equal(copied[0].weight, expected)


def test_memory_of_its_own_can_be_shared(tmp_path) -> None:
    model = _from_a_file(tmp_path)
    model.register_parameter("tied", model[0].weight)
    model.half_of_it = model[0].weight.detach()[:32]
    weight, expected = model[0].weight, model[0].weight.detach().clone()
    own_memory_(model)
    assert model[0].weight is weight is model.tied and torch.equal(weight, expected)
    assert weight.untyped_storage().resizable()
    assert model.half_of_it.data_ptr() == weight.data_ptr()
    copied = copy_model(model)
    assert torch._C._data_address(copied[0].weight) == torch._C._data_address(weight)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(copied[0].weight, expected)


@pytest.mark.filterwarnings("ignore")
def test_an_empty_buffer_can_still_grow_in_the_copy_and_in_the_original() -> None:
    qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model = nn.Sequential(qconfig.weight())
    assert model[0].activation_post_process.min_val.numel() == 0
    copied = copy_model(model)
    x = torch.randn(4, 4)
    assert torch.equal(copied(x), model(x))
    assert model[0].activation_post_process.min_val.numel() == 4


class Slotted:
    __slots__ = ("norm",)

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Runs(nn.Module):
    """Calls its norm through something that it holds."""

    def __init__(self, hold) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.held = hold(self.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call(self.held, self.conv(x))


def call(held, x: torch.Tensor) -> torch.Tensor:
    held = held() if isinstance(held, weakref.ref) else held
    if isinstance(held, list | set | tuple | UserList):
        (held,) = held
    if isinstance(held, dict):
        ((key, value),) = held.items()
        held = key if isinstance(key, nn.Module) else value
    return held(x)


PINNED = {
    "a list of closures": lambda norm: [lambda x: norm(x)],
    "a dict of partials": lambda norm: {"f": partial(nn.Module.__call__, norm)},
    "a closure over a list": lambda norm: (lambda held: lambda x: held[0](x))([norm]),
    "a default": lambda norm: lambda x, norm=norm: norm(x),
    "a keyword's default": lambda norm: [lambda x, *, norm=norm: norm(x)],
    "a set": lambda norm: {norm},
    "a tuple of bound methods": lambda norm: (norm.forward,),
    "a weak reference": weakref.ref,
    "the key of a dict": lambda norm: {norm: 1},
    "slots": Slotted,
    "a UserList": lambda norm: UserList([norm]),
    "a cached function": lambda norm: lru_cache(maxsize=0)(lambda x: norm(x)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PINNED)
def test_a_norm_that_nothing_can_be_put_in_the_place_of_stays(kind: str) -> None:
    torch.manual_seed(0)
    model = models.randomize_norms_(Runs(PINNED[kind]).eval()).double()
    assert model.norm in Tree(model).pinned
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = model(x)
    result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
    assert not result.report.changes
    # What copies the held thing may leave it with the original's norm, which is the same function.
    torch.testing.assert_close(result.model(x), want, rtol=0, atol=1e-12)


class RunsFirst(Runs):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held[0](self.conv(x))


def test_a_norm_that_a_list_holds_can_be_exchanged() -> None:
    for hold in (lambda norm: [norm], lambda norm: {0: norm}, lambda norm: (norm,)):
        model = models.randomize_norms_(RunsFirst(hold).eval()).double()
        assert not Tree(model).pinned
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
        assert len(result.report.changes) == 1
        torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)


def test_a_norm_that_a_hook_of_another_module_calls_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().double()
    models.randomize_norms_(model)
    norm = model[1]
    model[2].register_forward_hook(lambda module, args, output: output + norm(args[0]))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = model(x)
    result = rewrite.convert(model, "fold", example_inputs=x, verify=False)
    assert not result.report.changes
    torch.testing.assert_close(result.model(x), want, rtol=0, atol=1e-12)
