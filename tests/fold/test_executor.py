"""rewrite.fold.executor: one fold in memory and on a state dict is the same, bit for bit."""

from __future__ import annotations

import gc
import json
import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import models
import rewrite
from passes import FoldNorm
from rewrite.errors import CheckpointError
from rewrite.fold.executor import run_recipes
from rewrite.fold.recipes import from_data
from rewrite.fold.replay import apply_report
from rewrite.fold.store import StateDictStore
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model

NAMES = (
    "residual", "depthwise", "grouped_transpose", "norm_norm", "shared_conv_and_norm",
    "norm_under_two_names", "norm_with_activation", "linear_norm", "parallel_branches",
    "transformer", "batch_norm_transformer", "norm_first", "functional_norm_deep",
)  # fmt: skip


class Constants(nn.Module):
    """Scales by what a forward computes of its tensors: 1 + w, exp(w), a frozen batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.w = nn.Parameter(torch.rand(4, 1, 1))
        self.log = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * (1 + self.w)
        y = y * self.log.exp().view(1, -1, 1, 1)
        scale = (self.var + 1e-5).rsqrt().reshape(1, -1, 1, 1)
        return torch.relu(y * scale - self.mean[:, None, None] * scale)


def report_and_state(
    model: nn.Module, inputs: Any, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    result = rewrite.convert(model, FoldNorm(**options), example_inputs=inputs, verify=False)
    return json.loads(result.report.to_json()), result.model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, "constants"])
def test_in_memory_and_on_a_state_dict_a_fold_is_the_same_bit_for_bit(name, dtype) -> None:
    if name == "constants":
        model, inputs = Constants().eval(), (torch.randn(1, 3, 8, 8),)
    else:
        model, inputs = models.build(name)
    model = model.to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    other = copy_model(model)
    for parameter in other.parameters():
        parameter.data = parameter.data * (torch.rand(parameter.shape) + 0.5).to(dtype)
    report, _ = report_and_state(model, inputs)
    _, want = report_and_state(other, inputs)
    got = apply_report(report, other.state_dict())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_constant_that_is_computed_is_replayed_as_it_is_computed() -> None:
    model, x = Constants().double().eval(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    report, folded = report_and_state(model, x)
    assert not {"w", "log"} & folded.keys()
    other = Constants().double().eval()
    state = apply_report(report, other.state_dict())
    y = F.conv2d(x, state["conv.weight"], state["conv.bias"])
    assert torch.allclose(torch.relu(y), other(x), rtol=0, atol=1e-12)


def test_a_leftover_is_replayed_as_the_multiply_add_that_it_is() -> None:
    model, inputs = models.build("norm_first")
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU())
    models.randomize_norms_(model.double().eval())
    inputs = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    report, _ = report_and_state(model, inputs, leftover="affine")
    other = models.randomize_norms_(copy_model(model), 5)
    _, want = report_and_state(other, inputs, leftover="affine")
    got = apply_report(report, other.state_dict())
    assert got.keys() == want.keys() == {"1.weight", "1.bias"}
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_within_half_an_ulp_of_its_exact_value(name: str) -> None:
    model, inputs = models.build(name)
    model = model.float()
    inputs = tuple(t.float() if t.is_floating_point() else t for t in inputs)
    applied = apply_pass(FoldNorm(), model, inputs, keep_exact=True)
    stored = dict(applied.model.named_parameters(remove_duplicate=False))
    written = {key: value() for key, value in applied.exact.items() if key in stored}
    assert written
    for key, value in written.items():
        assert value.dtype is torch.float64 and torch.equal(stored[key], value.to(torch.float32))
        assert not value.any() or key.endswith("bias") or not torch.equal(value, value.float())


def test_a_norm_whose_own_weight_is_computed_folds_as_that_is_in_float64() -> None:
    """The weight that float32 computes is another: it is rounded before it is folded."""
    torch.manual_seed(0)
    model = models.randomize_norms_(Net().eval())
    weight_norm(model.norm, dim=None)
    for name, parameter in model.norm.named_parameters():
        if name != "bias":
            parameter.data = torch.rand(parameter.shape) + 0.5
    x = torch.randn(1, 3, 8, 8)
    report, state = report_and_state(model, x)
    replayed = apply_report(report, model.state_dict())
    assert replayed.keys() == state.keys() == {"conv.weight", "conv.bias"}
    assert all(torch.equal(replayed[key], state[key]) for key in state)
    _, wide = report_and_state(copy_model(model).double(), x.double())
    applied = apply_pass(FoldNorm(), copy_model(model), (x,), keep_exact=True)
    for key, tensor in state.items():
        exact = applied.exact[key]()
        assert torch.allclose(exact, wide[key], rtol=1e-9, atol=0)
        assert torch.equal(tensor, exact.float())
    scale = (model.norm.running_var.double() + model.norm.eps).rsqrt()
    early = model.conv.weight.double() * (scale * model.norm.weight.detach())[:, None, None, None]
    assert not torch.allclose(early, wide["conv.weight"], rtol=1e-9, atol=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("norm.running_var", -1.0, r"norm\.running_var is negative"),
        ("norm.running_var", float("nan"), r"norm\.running_var holds values that are not finite"),
        ("norm.running_mean", float("inf"), r"norm\.running_mean holds values that are not finite"),
        ("norm.weight", float("nan"), r"norm\.weight holds values that are not finite"),
        ("conv.weight", float("nan"), r"conv\.weight holds values that are not finite"),
    ],
)
def test_a_checkpoint_without_a_map_is_refused_by_name(key, value, reason) -> None:
    model = models.randomize_norms_(Net().eval())
    report, _ = report_and_state(model, torch.randn(1, 3, 8, 8))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_report(report, state)
    state[key].view(-1)[1] = value
    with pytest.raises(CheckpointError, match=reason):
        apply_report(report, state)
    model.load_state_dict(state)
    if key.startswith("norm"):
        result = rewrite.convert(model, "fold", verify=False)
        (skip,) = result.report.skips
        assert not result.report.changes and re.search(reason, skip.reason)
    else:
        with pytest.raises(rewrite.PassError, match=reason.replace("holds", "would hold")):
            rewrite.convert(model, "fold", verify=False)


class Compensated(nn.Module):
    """The value in front of the norm has another reader, which absorbs the inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.tanh(self.norm(y)) + self.other(y)


def test_a_scale_of_zero_is_refused_where_an_inverse_is_taken_up() -> None:
    model = models.randomize_norms_(Compensated().eval())
    report, _ = report_and_state(model, torch.randn(1, 3, 8, 8), compensate=True)
    assert len(report["passes"][0]["changes"]) == 1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_report(report, state)
    state["norm.weight"][2] = 0.0
    with pytest.raises(CheckpointError, match=r"norm.*scale of zero.*norm\.weight holds 0"):
        apply_report(report, state)
    plain = models.randomize_norms_(Net().eval())
    report, _ = report_and_state(plain, torch.randn(1, 3, 8, 8))
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    state["norm.weight"][2] = 0.0
    assert not apply_report(report, state)["conv.weight"][2].any()


def test_a_value_that_overflows_its_type_is_no_fold() -> None:
    model = models.randomize_norms_(Net().eval())
    with torch.no_grad():
        model.norm.running_var.fill_(1e-9)
        model.norm.eps = 1e-9
        model.conv.weight.mul_(100)
    for dtype, changes in ((torch.float16, 0), (torch.bfloat16, 1)):
        copy = copy_model(model).to(dtype)
        copy.norm.running_var = torch.full((4,), 1e-9)
        try:
            result = rewrite.convert(copy, "fold", verify=False)
        except rewrite.PassError as error:
            assert changes == 0 and "not finite in torch.float16" in str(error)
        else:
            assert len(result.report.changes) == changes


@pytest.mark.parametrize("channel", [0, 599])
def test_a_value_that_overflows_is_found_in_each_block_of_a_large_weight(channel: int) -> None:
    model = nn.Sequential(nn.Conv1d(600, 600, 1), nn.BatchNorm1d(600)).half().eval()
    assert len(rewrite.convert(model, "fold", verify=False).report.changes) == 1
    with torch.no_grad():
        model[1].weight[channel] = 6e4
        model[0].weight[channel, 599] = 10
    with pytest.raises(rewrite.PassError, match=r"0\.weight would hold values that are not finite"):
        rewrite.convert(model, "fold", verify=False)


class Noting(StateDictStore):
    """Notes the names of what is written."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        self.written: list[str] = []

    def set(self, name: str, tensor: Tensor) -> None:
        self.written.append(name)
        super().set(name, tensor)


def test_the_largest_weight_is_written_first_whatever_the_order_of_the_norms() -> None:
    parts: list[nn.Module] = []
    for into, out in ((2, 3), (3, 9), (9, 4)):
        parts += [nn.Conv2d(into, out, 1), nn.BatchNorm2d(out)]
    model = models.randomize_norms_(nn.Sequential(*parts).eval())
    report, state = report_and_state(model, torch.randn(1, 2, 4, 4))
    recipes = [from_data(change["recipe"]) for change in report["passes"][0]["changes"]]
    stores = [Noting(model.state_dict()) for _ in range(2)]
    for store, order in zip(stores, (recipes, recipes[::-1]), strict=True):
        run_recipes(order, store)
        weights = [name for name in store.written if name.endswith("weight")]
        assert weights == ["4.weight", "2.weight", "0.weight"]
        assert all(torch.equal(store.state[name], state[name]) for name in store.written)


def test_branches_are_added_up_before_they_are_rounded() -> None:
    model, inputs = models.build("parallel_branches")
    narrow = copy_model(model).float()
    wide = copy_model(narrow).double()
    images = tuple(t.float() for t in inputs)
    got = rewrite.convert(narrow, "fold", example_inputs=images).model.state_dict()
    want = rewrite.convert(wide, "fold", example_inputs=inputs).model.state_dict()
    assert any("merged_conv" in key for key in got)
    assert all(torch.equal(got[key], want[key].float()) for key in want)


@pytest.mark.parametrize("keep_exact", [False, True])
def test_old_weights_stay_in_memory_only_where_their_exact_values_are_asked_for(
    keep_exact: bool,
) -> None:
    model = models.randomize_norms_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), 1)
    old = weakref.ref(model[0].weight.untyped_storage())
    applied = apply_pass(FoldNorm(), model, keep_exact=keep_exact)
    gc.collect()
    assert applied.changes
    assert set(applied.exact) == ({"0.weight", "0.bias"} if keep_exact else set())
    assert (old() is not None) is keep_exact
