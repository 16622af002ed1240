"""rewrite.runtime.closures: a hook of a copy reads and writes the copy."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.runtime.closures import functions_of, rebound
from rewrite.runtime.copying import copy_model


class Seen(nn.Module):
    """A network whose first layer may be hooked, and which counts what its hooks note."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.seen: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))


WATCHED: dict[str, Any] = {}
model_of_the_script: Seen
count = 0


def note_in_global(*_: Any) -> None:
    """Count at the model that a global variable names, and in a number of the program."""
    global count
    count += 1
    model_of_the_script.calls += 1


def by_way_of_another(*_: Any) -> None:
    note_in_global()


def by_closure(model: Seen) -> Any:
    return lambda *_: model.seen.append(torch.zeros(1))


def by_list(model: Seen) -> Any:
    held = [model.head, model]
    return lambda *_: held[1].seen.append(torch.zeros(1))


def by_default(model: Seen) -> Any:
    def hook(_: nn.Module, args: Any, output: Tensor, model: Seen = model) -> None:
        model.calls += 1

    return hook


def by_keyword(model: Seen) -> Any:
    def hook(*_: Any, held: Seen = model) -> None:
        held.calls += 1

    return hook


def by_partial(model: Seen) -> Any:
    return functools.partial(lambda inner, *_: inner(), by_closure(model))


def by_global(model: Seen) -> Any:
    global model_of_the_script
    model_of_the_script = model
    return note_in_global


def by_global_of_another(model: Seen) -> Any:
    by_global(model)
    return by_way_of_another


WAYS = (
    by_closure, by_list, by_default, by_keyword, by_partial, by_global, by_global_of_another
)  # fmt: skip


def _randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model.eval().double()


@pytest.mark.parametrize("way", WAYS)
def test_the_hook_of_a_copy_writes_into_the_copy(way: Any) -> None:
    model = Seen()
    model.first.register_forward_hook(way(model))
    twin = copy_model(copy_model(model))
    twin(torch.randn(2, 6))
    assert model.seen == [] and model.calls == 0
    assert len(twin.seen) + twin.calls == 1
    model(torch.randn(2, 6))
    assert len(model.seen) + model.calls == 1 and len(twin.seen) + twin.calls == 1


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_conversion_leaves_the_argument_of_such_a_hook_alone(way: Any, example: bool) -> None:
    model = _randomized(Seen())
    model.first.register_forward_hook(way(model))
    x = torch.randn(4, 6, dtype=torch.float64)
    result = rewrite.convert(model, "fold", example_inputs=x if example else None)
    assert model.seen == [] and model.calls == 0
    assert type(model_of_the_script) is Seen if way in (by_global, by_global_of_another) else True
    torch.testing.assert_close(result.model(x * 9), model(x * 9), rtol=1e-12, atol=1e-12)
    assert len(model.seen) + model.calls == 1
    assert len(result.model.seen) + result.model.calls == 1


def test_what_a_hook_collects_outside_of_the_model_stays_where_it_is() -> None:
    collected: list[Tensor] = []
    model = Seen()
    model.first.register_forward_hook(lambda module, args, out: collected.append(out))
    twin = copy_model(model)
    twin(torch.randn(2, 6))
    assert len(collected) == 1
    hook = next(iter(twin.first._forward_hooks.values()))
    assert hook is next(iter(model.first._forward_hooks.values()))


def test_only_the_cells_that_hold_the_model_are_exchanged() -> None:
    collected: list[int] = []
    model = Seen()

    def hook(*_: Any) -> None:
        model.calls += 1
        collected.append(model.calls)

    model.first.register_forward_hook(hook)
    twin = copy_model(model)
    twin(torch.randn(2, 6))
    assert collected == [1] and model.calls == 0


def test_globals_of_the_program_are_read_and_written_where_they_are() -> None:
    model = Seen()
    model.first.register_forward_hook(by_global(model))
    twin = copy_model(model)
    before = count
    twin(torch.randn(2, 6))
    assert count == before + 1 and model_of_the_script is model


def test_another_model_in_a_closure_is_shared() -> None:
    model, teacher = Seen(), nn.Linear(6, 6)
    model.first.register_forward_hook(lambda *_: teacher(torch.zeros(1, 6)))
    hook = next(iter(copy_model(model).first._forward_hooks.values()))
    assert hook is next(iter(model.first._forward_hooks.values()))


def test_functions_are_found_in_hooks_attributes_and_containers() -> None:
    model = Seen()
    one, two, three = (lambda: None), (lambda: None), (lambda: None)
    model.first.register_forward_pre_hook(one)
    model.first.act = two  # type: ignore[assignment]
    model.first.table = {"a": [functools.partial(three)]}  # type: ignore[assignment]
    found = set(functions_of(vars(model.first).items()))
    assert {one, two, three} <= found
    assert rebound(one, lambda value: True) is None
