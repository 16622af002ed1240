from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite.runtime.float64 import in_float64
from rewrite.runtime.modes import evaluating, isolated


class HardCoded(nn.Module):
    """Breaks `model.double()`: types written into the forward, a constant, a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(4, 3)
        self.scale = torch.tensor([0.1])
        self.several = [torch.tensor(0.3)]

    def forward(self, x):
        x = self.norm(self.conv(x)).float() * self.scale + self.several[0]
        x = x + torch.arange(x.shape[-1], dtype=torch.float32)
        self.last = x
        return self.rnn(x.transpose(1, 2))[0]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_everything_is_computed_in_float64():
    model = HardCoded().eval()
    x = torch.randn(2, 2, 8)
    narrow = model(x)
    for streamed in (False, True):
        with torch.no_grad(), in_float64(model, streamed=streamed):
            wide = model(x.double())
        assert wide.dtype == torch.float64
        assert 0 < float((wide - narrow).detach().abs().max()) < 1e-5


def test_streamed_gives_the_same_as_a_whole_copy():
    model = HardCoded().eval()
    x = torch.randn(2, 2, 8, dtype=torch.float64)
    results = []
    for streamed in (False, True):
        with torch.no_grad(), in_float64(model, streamed=streamed):
            results.append(model(x))
    assert torch.equal(*results)


def test_the_model_is_as_before_even_in_train_mode():
    model = HardCoded()
    before, attributes = state(model), set(vars(model))
    parameters = [id(p) for p in model.parameters()]
    with in_float64(model):
        model(torch.randn(2, 2, 8, dtype=torch.float64))
        assert not torch.equal(model.norm.running_mean, before["norm.running_mean"].double())
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert set(vars(model)) == attributes
    assert model.norm.num_batches_tracked == 0
    model(torch.randn(2, 2, 8))


def test_ties_stay_ties():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with in_float64(model):
        assert model[1].weight is model[0].weight
        assert model[0].weight.dtype == torch.float64


def test_isolated_leaves_no_trace_of_a_forward():
    model = HardCoded()
    before = state(model)
    with isolated(model):
        model(torch.randn(2, 2, 8))
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert not hasattr(model, "last")


def test_evaluating_puts_each_module_back_into_its_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.ReLU())
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model.training
    assert model[0].training
    assert not model[1].training


class Masks(nn.Module):
    """Fills with the least number of the dtype that it is given, in no dtype of its own (XGLM)."""

    def forward(self, x):
        return torch.maximum(x, torch.full((), torch.finfo(x.dtype).min))


def test_a_number_that_only_float64_holds_fills_a_tensor():
    x = torch.randn(3, dtype=torch.float64)
    with in_float64(Masks()):
        assert torch.equal(Masks()(x), x)
        assert torch.full((2,), 1).dtype == torch.int64
        assert torch.full((2,), 0.5, dtype=torch.int32).dtype == torch.int32


class Grouped(nn.Module):
    """Products of groups of rows with a matrix each: the experts of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.grouped_mm(x, self.weight, offs=ends)


def test_grouped_products_are_computed_in_float64():
    model, x = Grouped(), torch.randn(8, 8)
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    narrow = model(x, ends)
    wide = x.double() @ model.weight.double()
    expected = torch.cat([wide[0, :3], wide[2, 3:]])
    with in_float64(model):
        found = model(x.double(), ends)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert 1e-9 < float((found - narrow).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("given", ["rows", "columns", "sum", "batch"])
def test_every_form_of_a_grouped_product(given):
    """Held against the float32 operator, which knows all four."""
    shapes = {
        "rows": ((8, 8), (2, 8, 16)), "columns": ((2, 8, 8), (8, 16)),
        "sum": ((8, 16), (16, 8)), "batch": ((2, 8, 8), (2, 8, 16)),
    }  # fmt: skip
    a, b = (torch.randn(*shape) for shape in shapes[given])
    ends = None if given == "batch" else torch.tensor([8, 8 if given == "rows" else 16])
    if ends is not None:
        ends = ends.int()
    narrow = torch.nn.functional.grouped_mm(a, b, offs=ends)
    with in_float64(nn.Module()):
        wide = torch.nn.functional.grouped_mm(a.double(), b.double(), offs=ends)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-5, atol=1e-5)


class Watches(nn.Module):
    """Registers a hook at the first call, and notes that it did, as transformers does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = []

    def forward(self, x):
        if not getattr(self, "watching", False):
            self.layer.register_forward_hook(lambda module, args, output: self.seen.append(output))
            self.watching = True
        return self.layer(x)


def test_hooks_that_a_forward_registers_go_with_the_note_of_them():
    model = Watches()
    kept = model.layer.register_forward_hook(lambda module, args, output: None)
    for _ in range(2):
        with isolated(model):
            model(torch.zeros(1, 2))
        assert list(model.layer._forward_hooks) == [kept.id] and not hasattr(model, "watching")
    model.seen.clear()
    model(torch.zeros(1, 2))
    assert len(model.seen) == 1
