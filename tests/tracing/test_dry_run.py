"""Calls without numbers: shapes come out, nothing of the model or its stand-in changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.runtime.stand_in import stand_in, without_values
from rewrite.runtime.tree import Tree
from rewrite.tracing.dry_run import DryRun, on_meta


class Opaque(nn.Module):
    """Counts its calls, and calls its layers in another order than it registers them."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(5, 2), nn.Linear(3, 5)
        self.calls, self.seen = 0, [1]

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return self.second(self.first(x)) * (2 if twice else 1)


def dry_run(model: nn.Module, *args: Tensor) -> DryRun:
    tree = Tree(model)
    copied = Tree(stand_in(tree, without_values, without_values))
    return DryRun(tree, copied, (args, {}))


def test_a_function_is_run_for_its_shape() -> None:
    run = dry_run(nn.Linear(3, 5), torch.randn(4, 3))
    made = run.run_function(torch.cat, (([torch.randn(2, 3), torch.randn(4, 3)],), {"dim": 0}))
    assert made.is_meta and made.shape == (6, 3) and not run.running


def test_a_module_is_run_with_its_arguments_and_keywords() -> None:
    run = dry_run(Opaque(), torch.randn(4, 3))
    made = run.run_module("", ((torch.randn(4, 3),), {"twice": True}), opaque=False)
    assert made.is_meta and made.shape == (4, 2)


def test_what_an_opaque_module_calls_is_noted_and_its_state_put_back() -> None:
    model = Opaque()
    tree = Tree(model)
    copied = Tree(stand_in(tree, without_values, without_values))
    run = DryRun(tree, copied, ((torch.randn(4, 3),), {}))
    run.run_module("", ((torch.randn(4, 3),), {}), opaque=True)
    shapes = {name: args[0].shape for name, (args, _) in run.inputs.items()}
    assert shapes == {"": (4, 3), "first": (4, 3), "second": (4, 5)}
    stood = copied.model
    assert stood.calls == 0 and stood.seen == [1] and model.calls == 0
    assert not stood.first._forward_pre_hooks and not model.first._forward_pre_hooks


def test_a_module_that_can_be_traced_is_not_watched() -> None:
    run = dry_run(Opaque(), torch.randn(4, 3))
    run.run_module("", ((torch.randn(4, 3),), {}), opaque=False)
    assert set(run.inputs) == {""}


def test_the_first_call_of_a_module_is_the_one_that_is_noted() -> None:
    run = dry_run(Opaque(), torch.randn(4, 3))
    for batch in (4, 7):
        run.run_module("", ((torch.randn(batch, 3),), {}), opaque=True)
    assert run.inputs["first"][0][0].shape == (4, 3)


def test_a_call_that_fails_leaves_no_hook_and_no_state() -> None:
    model = Opaque()
    tree = Tree(model)
    copied = Tree(stand_in(tree, without_values, without_values))
    run = DryRun(tree, copied, ((torch.randn(4, 9),), {}))
    with pytest.raises(RuntimeError, match="reduction dim"):
        run.run_module("", ((torch.randn(4, 9),), {}), opaque=True)
    assert copied.model.calls == 0 and not copied.model.first._forward_pre_hooks
    assert not run.running


def test_what_asks_for_a_number_is_refused() -> None:
    run = dry_run(nn.Linear(3, 5), torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="meta tensors"):
        run.run_function(lambda x: x.sum().item(), ((torch.randn(2),), {}))


def test_what_the_meta_device_does_not_know_is_run_with_fake_tensors() -> None:
    def picky(x: Tensor) -> Tensor:
        if x.device.type == "meta":
            raise NotImplementedError("not on this device")
        return x.relu()

    run = dry_run(nn.Linear(3, 5), torch.randn(4, 3))
    made = run.run_function(picky, ((torch.randn(2, 3),), {}))
    assert made.is_meta and made.shape == (2, 3), "and comes back on the meta device"


def test_new_tensors_of_a_function_are_made_without_numbers() -> None:
    run = dry_run(nn.Linear(3, 5), torch.randn(4, 3))
    made = run.run_function(torch.zeros, ((2, 3), {"device": torch.device("cpu")}))
    assert made.is_meta and made.shape == (2, 3)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_compiled_module_is_not_run() -> None:
    scripted = torch.jit.trace(nn.Linear(3, 5), torch.randn(4, 3))
    run = dry_run(nn.Sequential(scripted), torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="0 is compiled and is not run"):
        run.run_module("0", ((torch.randn(4, 3),), {}), opaque=False)


def test_a_value_on_meta_keeps_its_shape_dtype_and_strides() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64).transpose(0, 2)
    made = on_meta({"a": [x, 1]})
    assert made["a"][1] == 1 and made["a"][0].is_meta
    assert (made["a"][0].shape, made["a"][0].stride()) == (x.shape, x.stride())
    assert made["a"][0].dtype is torch.float64
    assert on_meta(made["a"][0]) is made["a"][0]
