"""Negative controls: each deliberately wrong twin has to be caught, at the right module.

A twin is the original with one norm or activation tampered with, then rewritten by a real pass: the
rewrite is right and the result is wrong in exactly one place.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_map

import models
import rewrite
from passes import FoldNorm, MergeBranches, RemoveWeightNorm, WeightNorm
from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import verify
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model
from rewrite.runtime.tree import Tree


def gamma_off(norm):
    gamma_off_in(norm, -1)


def channels_swapped(norm):
    for key in ("weight", "bias"):
        value = getattr(norm, key).detach().clone()
        value[[0, 1]] = value[[1, 0]]
        setattr(norm, key, nn.Parameter(value))


def eps_forgotten(norm):
    norm.eps = 0.0


def bias_not_scaled(norm):
    """Shift the mean as if a convolution's bias had gone past the norm without its scale."""
    bias = torch.linspace(0.5, 1, len(norm.running_mean)).to(norm.running_mean)
    sigma = (norm.running_var + norm.eps).sqrt()
    norm.running_mean = norm.running_mean + bias - bias * sigma / norm.weight.detach()


ERRORS = (gamma_off, channels_swapped, eps_forgotten, bias_not_scaled)


def batch_norms(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in Tree(model).modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and module.weight is not None
        and module.bias is not None
    ]


# Not run with its example; stored so coarsely that 1e-4 is no difference; not to be set by hand.
LEFT_OUT = (
    "never_called",
    "branching_root",
    "bfloat16",
    "half",
    "mixed_precision",
    "parametrized_norm",
)


def norm_models(step: int) -> list[str]:
    """Return every `step`-th reference model with a BatchNorm, over the whole list."""
    names = [
        name
        for name, factory in models.all_models().items()
        if name not in LEFT_OUT and batch_norms(factory())
    ]
    return names[::step]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", norm_models(9))
def test_a_wrong_norm_is_caught_and_located(name, error):
    model, inputs = models.build(name)
    model.eval()
    target = batch_norms(model)[-1]
    wrong = copy_model(model)
    error(Tree(wrong).get(target))
    found = verify(model, wrong, inputs)
    assert not found.ok
    assert found.divergence is not None
    assert found.divergence.target == target


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", norm_models(11))
def test_a_wrong_fold_is_caught_and_located(name, error):
    model, inputs = models.build(name)
    model.eval()
    wrong = copy_model(model)
    folded = rewrite.convert(model, [FoldNorm()], verify=False)
    sites = [set(change.touched) for change in folded.report.changes]
    target = next(
        (n for n in batch_norms(model) if any(n in site for site in sites)), batch_norms(model)[0]
    )
    error(Tree(wrong).get(target))
    result = rewrite.convert(wrong, [FoldNorm()], verify=False)
    touched = {n: "fold" for change in result.report.changes for n in change.touched}
    found = verify(model, result.model, inputs, touched=touched)
    assert verify(model, folded.model, inputs, level=Level.QUICK).ok
    assert not found.ok
    right = {target}.union(*(site for site in sites if target in site))
    assert found.divergence.target in right
    assert (found.divergence.rewrite == "fold") == (found.divergence.target in touched)


def one_channel_off(name: str, channel: int) -> None:
    """Hold a float32 fold with 1e-4 wrong in one channel, as `convert` does, and a right one."""
    model, given = models.build(name)
    model.eval().float()
    right = rewrite.convert(model, [FoldNorm()], verify=False)
    target = batch_norms(model)[-1]
    wrong = copy_model(model)
    gamma_off_in(Tree(wrong).get(target), channel)
    spoiled = rewrite.convert(wrong, [FoldNorm()], verify=False).model
    inputs = tree_map(narrow, given)
    assert verify(model, right.model, inputs, level=Level.QUICK).ok
    found = verify(model, spoiled, inputs, level=Level.QUICK)
    site = next((change.touched for change in right.report.changes if target in change.touched), ())
    assert not found.ok
    assert found.divergence.target in {target, *site}


def narrow(leaf):
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


@pytest.mark.parametrize("channel", [0, 1, 2, -1])
@pytest.mark.parametrize("name", norm_models(6))
def test_one_channel_of_one_fold_is_caught_on_a_single_input(name, channel):
    one_channel_off(name, channel)


@pytest.mark.slow
@pytest.mark.parametrize("channel", [0, 1, 2, -1])
@pytest.mark.parametrize("name", norm_models(1))
def test_one_channel_of_any_fold_is_caught_on_a_single_input(name, channel):
    one_channel_off(name, channel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamp", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish()])
def test_a_channel_that_a_clamp_hides_is_looked_at(clamp, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), clamp, nn.Conv2d(4, 2, 1)).eval()
    model = models.randomize_norms_(model).to(dtype)
    with torch.no_grad():
        model[1].bias[2] = -50
    wrong = copy_model(model)
    gamma_off_in(wrong[1], 2)
    x = (torch.randn(1, 3, 6, 6, dtype=dtype),)
    assert torch.equal(model(*x), wrong(*x))
    folded = rewrite.convert(wrong, [FoldNorm()], verify=False).model
    found = verify(model, folded, x, level=Level.QUICK)
    assert found.divergence.target in ("0", "1")
    right = rewrite.convert(model, [FoldNorm()], verify=False).model
    assert verify(model, right, x, level=Level.QUICK).ok


def gamma_off_in(norm: nn.Module, channel: int) -> None:
    gamma = norm.weight.detach().clone()
    gamma[channel] *= 1 + 1e-4
    norm.weight = nn.Parameter(gamma)


def test_a_scale_that_goes_through_a_clamp_is_no_difference():
    """What a fold does on purpose: values on both sides of a ReLU differ, and none is wrong."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    moved = copy_model(model)
    scale = torch.tensor([2.0, 0.5, 3.0, 1.5]).double()
    moved[0].weight = nn.Parameter(model[0].weight.detach() * scale.view(-1, 1, 1, 1))
    moved[0].bias = nn.Parameter(model[0].bias.detach() * scale)
    moved[2].weight = nn.Parameter(model[2].weight.detach() / scale.view(1, -1, 1, 1))
    assert verify(model, moved, X).ok


class Branches(nn.Module):
    """Two blocks of parallel branches, RepVGG's, with a ReLU behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        return self.second(self.first(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.wide_norm, self.point_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.skip_norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        branches = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x))
        return self.act(branches + self.skip_norm(x))


def branch_lost(norm):
    norm.weight, norm.bias = (nn.Parameter(torch.zeros_like(p)) for p in (norm.weight, norm.bias))


@pytest.mark.parametrize("block", ["first", "second"])
@pytest.mark.parametrize("norm", ["wide_norm", "point_norm", "skip_norm"])
@pytest.mark.parametrize("error", [*ERRORS, branch_lost], ids=lambda error: error.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_merge_of_branches_is_caught_and_located(error, norm, block, dtype):
    torch.manual_seed(0)
    model = models.randomize_norms_(Branches()).to(dtype).eval()
    wrong = copy_model(model)
    error(wrong.get_submodule(f"{block}.{norm}"))
    x = (torch.randn(2, 4, 6, 6, dtype=dtype),)
    assert rewrite.convert(model, [MergeBranches()], example_inputs=x).report.ok
    result = rewrite.convert(wrong, [MergeBranches()], verify=False)
    touched = {name: "merge-branches" for c in result.report.changes for name in c.touched}
    found = verify(model, result.model, x, touched=touched, level=Level.QUICK)
    assert not found.ok
    assert found.divergence.target in (block, f"{block}.merged_conv", f"{block}.{norm}")
    assert found.divergence.rewrite == "merge-branches"


def test_an_activation_lost_behind_merged_branches_is_located():
    model = models.randomize_norms_(Branches()).double().eval()
    merged = rewrite.convert(model, [MergeBranches()], verify=False).model
    merged.first.act = nn.Identity()
    x = (torch.randn(2, 4, 6, 6).double(),)
    found = verify(model, merged, x, level=Level.QUICK)
    assert (found.divergence.target, found.divergence.function) == ("first.act", "relu")


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.first(x))
        return torch.tanh(self.second(x))


X = (torch.linspace(-2, 2, 3 * 64).reshape(1, 3, 8, 8).double(),)


def test_a_lost_activation_module_is_located():
    model = Chain().double()
    wrong = copy_model(model)
    wrong.act = nn.Identity()
    found = verify(model, wrong, X)
    assert found.divergence.target == "act"
    assert found.divergence.function == "relu"


def test_a_lost_functional_activation_is_located_by_its_line():
    class Lost(Chain):
        def forward(self, x):
            return self.second(self.act(self.first(x)))

    torch.manual_seed(0)
    model = Chain().double()
    torch.manual_seed(0)
    found = verify(model, Lost().double(), X)
    assert (found.divergence.target, found.divergence.function) == ("", "tanh")
    assert "test_divergence.py" in found.divergence.source
    assert "no such call" in found.divergence.note


def test_an_added_activation_is_located():
    class Added(Chain):
        def forward(self, x):
            x = torch.sigmoid(self.first(x))
            return torch.tanh(self.second(self.act(x)))

    torch.manual_seed(0)
    model = Chain().double()
    torch.manual_seed(0)
    found = verify(model, Added().double(), X)
    assert found.divergence.function == "sigmoid"


@pytest.mark.parametrize("twin", ["scaled", "swapped"])
def test_a_wrong_weight_norm_is_located(twin):
    model = Chain().double()
    right = rewrite.convert(model, [WeightNorm()], verify=False).model
    assert verify(model, right, X, contract=Contract.EXACT).ok
    held = right.second.parametrizations.weight
    magnitude = held.original0.detach().clone()
    if twin == "scaled":
        magnitude[1] *= 1 + 1e-4
    else:
        magnitude[[0, 1]] = magnitude[[1, 0]]
    held.original0 = nn.Parameter(magnitude)
    found = verify(model, right, X, contract=Contract.EXACT)
    assert not found.ok
    assert found.divergence.target == "second"


def test_a_wrongly_baked_weight_is_located():
    model = Chain().double()
    weight_norm(model.first)
    wrong = copy_model(model)
    wrong.first.parametrizations.weight.original0 = nn.Parameter(
        model.first.parametrizations.weight.original0.detach() * (1 + 1e-4)
    )
    baked = rewrite.convert(wrong, [RemoveWeightNorm()], verify=False).model
    found = verify(model, baked, X)
    assert found.divergence.target == "first"


def test_a_wrong_branch_is_found_beside_a_right_one():
    class Branches(Chain):
        def forward(self, x):
            return self.second(self.act(self.first(x))) + self.first(x)[:, :, 1:-1, 1:-1]

    model = Branches().double()
    wrong = copy_model(model)
    wrong.second.bias = nn.Parameter(wrong.second.bias.detach() + 1e-4)
    assert verify(model, wrong, X).divergence.target == "second"


def test_swapped_inputs_are_located_at_the_call_that_takes_them():
    class Difference(Chain):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            self.swapped = swapped

        def forward(self, x):
            a, b = self.first(x), self.act(self.first(x))
            return torch.sub(b, a) if self.swapped else torch.sub(a, b)

    torch.manual_seed(0)
    model = Difference(False).double()
    torch.manual_seed(0)
    found = verify(model, Difference(True).double(), X)
    assert found.divergence.function == "sub"
    assert found.divergence.error_in < 1e-12
    assert found.divergence.error_out > 1
