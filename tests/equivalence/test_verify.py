"""`verify`: what holds which contract, what breaks it, and what the judge looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewrite
from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import check_untouched, verify
from rewrite.errors import VerificationError
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model
from tests.equivalence.networks import Net, X, folded


@pytest.mark.parametrize("contract", [Contract.EXACT, Contract.EXACT_IN_EVAL])
def test_a_copy_holds_every_contract(net, contract):
    found = verify(net, copy_model(net), X, contract=contract)
    assert found.ok, str(found)
    assert found.max_abs == 0
    assert found.agreement == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_fold_breaks_its_contract(net, dtype):
    net = net.to(dtype)
    wrong = copy_model(net)
    gamma = wrong.norm.weight.detach().clone()
    gamma[3] *= 1 + 1e-4
    wrong.norm.weight = nn.Parameter(gamma)
    found = verify(net, folded(wrong), (X[0].to(dtype),))
    assert not found.ok
    assert found.divergence is not None
    assert found.divergence.target == "conv"


def test_an_approximation_is_measured_and_not_judged(net):
    other = copy_model(net)
    other.norm = nn.GroupNorm(2, 8)
    found = verify(net, other, X, contract=Contract.APPROXIMATE)
    assert found.ok
    assert 0 <= found.agreement <= 1
    assert 0 < found.cosine < 1
    assert not verify(net, other, X).ok


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: setattr(m, "head", nn.Linear(8, 5)), "shape"),
        (lambda m: setattr(m, "head", nn.Linear(9, 4)), "fails"),
        (lambda m: m.head.register_forward_hook(lambda *a: a[2] / 0), "not finite"),
        (lambda m: m.head.register_forward_hook(lambda *a: a[2].double()), "float64"),
        (
            lambda m: m.head.register_forward_hook(
                lambda m, i, o, n=[0]: (n.append(0), o + len(n))[1]
            ),
            "two runs",
        ),
    ],
)
def test_an_approximation_has_to_run_in_the_same_form(net, change, word):
    other = copy_model(net)
    change(other)
    found = verify(net, other, X, contract=Contract.APPROXIMATE)
    assert not found.ok
    assert word in str(found)


def test_without_inputs_some_are_inferred(net):
    found = verify(net, copy_model(net), level=Level.QUICK)
    assert found.ok
    assert found.cases[0].name == "inferred"


def test_without_any_known_input_the_error_says_what_to_pass():
    model = nn.Bilinear(2, 3, 4)
    with pytest.raises(VerificationError, match="--input"):
        verify(model, model)


def test_an_input_that_the_original_refuses_is_an_error(net):
    with pytest.raises(VerificationError, match="does not run"):
        verify(net, net, (torch.ones(1, 5, 8, 8),))


@pytest.mark.parametrize("contract", [Contract.EXACT, Contract.EXACT_IN_EVAL, Contract.APPROXIMATE])
def test_an_original_that_returns_nan_alone_proves_nothing(net, contract):
    """Its top-1 classes were counted as the same ones, with cosine 1."""
    broken = copy_model(net)
    broken.norm.running_var[:] = -1.0
    with pytest.raises(VerificationError, match="returns NaN alone, so there is nothing to comp"):
        verify(broken, broken, X, contract=contract)
    assert verify(broken, net, X, contract=Contract.REDEFINING).ok
    assert not verify(net, broken, X, contract=contract).ok


def test_calibration_batches_are_judged_without_their_labels(net):
    batches = [(X[0], torch.zeros(2)), (X[0] * 2, torch.zeros(2))]
    found = verify(net, copy_model(net), calibration=batches)
    assert found.ok
    assert sum(case.name.startswith("calibration") for case in found.cases) == 2


def test_the_function_is_public():
    rewrite.convert(Net().eval(), ["bn-to-gn"], example_inputs=X)
    assert callable(rewrite.verify)
    assert rewrite.Verification is not None


def test_check_untouched_names_what_changed_without_being_named(net):
    other = copy_model(net)
    other.head.weight = nn.Parameter(other.head.weight + 1e-7)
    other.norm.running_mean = other.norm.running_mean + 1
    assert check_untouched(net, net, ()) == []
    assert check_untouched(net, other, ()) == ["norm.running_mean", "head.weight"]
    assert check_untouched(net, other, ("norm",)) == ["head.weight"]
    assert check_untouched(net, other, ("norm", "head")) == []


def test_check_untouched_follows_replacements(net):
    other = copy_model(net)
    other.norm = nn.Sequential(nn.GroupNorm(2, 8))
    assert check_untouched(net, other, ("norm",)) == []
    assert check_untouched(net, other, ()) != []


def test_check_untouched_takes_nan_as_equal_to_itself(net):
    net.norm.running_mean[0] = float("nan")
    assert check_untouched(net, copy_model(net), ()) == []
