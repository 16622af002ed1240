from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

import models
import rewrite
from rewrite.equivalence.verification import Level
from rewrite.equivalence.verify import check_untouched, verify
from rewrite.errors import VerificationError
from rewrite.outcomes import Contract
from rewrite.runtime.copying import copy_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.head(self.drop(x).mean((2, 3)))
        return {"logits": x, "label": x.argmax(-1)}


X = (torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),)


@pytest.fixture
def net() -> nn.Module:
    return models.randomize_norms_(Net())


def folded(model: nn.Module) -> nn.Module:
    copy = copy_model(model.eval())
    copy.conv, copy.norm = fuse_conv_bn_eval(copy.conv, copy.norm), nn.Identity()
    return copy


@pytest.mark.parametrize("contract", [Contract.EXACT, Contract.EXACT_IN_EVAL])
def test_a_copy_holds_every_contract(net, contract):
    found = verify(net, copy_model(net), X, contract=contract)
    assert found.ok, str(found)
    assert found.max_abs == 0
    assert found.agreement == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_fold_holds_in_whatever_type_it_is_stored(net, dtype):
    net = net.to(dtype)
    found = verify(net, folded(net), (X[0].to(dtype),))
    assert found.ok, str(found)
    assert (found.rounding is None) == (dtype == torch.float64)


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


def test_weight_norm_is_exact_in_train_and_in_gradients(net):
    other = copy_model(net)
    weight_norm(other.conv)
    found = verify(net, other, X, contract=Contract.EXACT)
    assert found.ok, str(found)
    assert {case.name for case in found.cases} >= {"gradients", "train mode"}


@pytest.mark.parametrize(
    ("break_", "word"),
    [
        (lambda m: setattr(m.norm, "momentum", 0.2), "running_mean"),
        (lambda m: setattr(m, "drop", nn.Identity()), "train mode"),
    ],
)
def test_exact_sees_what_only_training_shows(net, break_, word):
    other = copy_model(net)
    break_(other)
    assert verify(net, other, X, contract=Contract.EXACT_IN_EVAL).ok
    found = verify(net, other, X, contract=Contract.EXACT)
    assert not found.ok
    assert word in str(found)


def test_exact_sees_a_gradient_that_is_cut():
    class Cut(nn.Module):
        def __init__(self, cut: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.cut = nn.Linear(3, 3), cut

        def forward(self, x):
            y = self.inner(x)
            return y.detach() + x if self.cut else y + x

    found = verify(Cut(False), Cut(True), (torch.ones(2, 3),), contract=Contract.EXACT)
    assert not found.ok
    assert "gradient" in str(found)


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


def test_batch_size_one_alone_would_not_show_a_mixed_up_batch():
    class Mixed(nn.Module):
        def __init__(self, mixed: bool) -> None:
            super().__init__()
            self.mixed = mixed

        def forward(self, x):
            return x - x.mean(0) if self.mixed else x * 0 if len(x) == 1 else x

    x = (torch.ones(1, 4),)
    assert verify(Mixed(False), Mixed(True), x, level=Level.QUICK).ok
    assert not verify(Mixed(False), Mixed(True), x).ok


def test_an_input_on_which_rounding_decides_is_left_out_by_name():
    class Chaotic(nn.Module):
        def __init__(self, extra: float) -> None:
            super().__init__()
            self.extra = extra

        def forward(self, x):
            x = x.abs() % 1  # zeros stay zeros
            for _ in range(200):
                x = 3.99 * x * (1 - x)
            return x + self.extra

    class Regrouped(Chaotic):
        def forward(self, x):
            x = x.abs() % 1
            for _ in range(200):
                x = 3.99 * (x - x * x)
            return x + self.extra

    x = (torch.full((1, 4), 0.3),)
    found = verify(Chaotic(0), Regrouped(0), x)
    assert found.ok
    assert "rounding alone" in found.cases[0].skipped
    alone = verify(Chaotic(0), Regrouped(0), x, level=Level.QUICK)
    assert not alone.ok and not all(case.failed for case in alone.cases)
    assert "no input tells the models apart: rounding alone" in alone.reasons[0]


def test_neither_model_is_changed(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    verify(net, copy_model(net), X, contract=Contract.EXACT)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net._forward_hooks
    assert all(p.grad is None for p in net.parameters())


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


def test_calibration_batches_are_judged_without_their_labels(net):
    batches = [(X[0], torch.zeros(2)), (X[0] * 2, torch.zeros(2))]
    found = verify(net, copy_model(net), calibration=batches)
    assert found.ok
    assert sum(case.name.startswith("calibration") for case in found.cases) == 2


def test_the_report_is_json_and_text(net):
    other = copy_model(net)
    other.norm.eps = 0.1
    found = verify(net, other, X)
    loaded = json.loads(found.to_json())
    assert loaded["ok"] is False
    assert loaded["divergence"]["target"] == "norm"
    assert "norm" in str(found)
    assert list(found.tables())


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


@pytest.mark.parametrize("options", [{"contract": "exactt"}, {"level": "nonsense"}])
def test_an_unknown_contract_or_level_is_an_error(options) -> None:
    with pytest.raises(rewrite.OptionError, match=r"is '(exactt|nonsense)'; pass "):
        verify(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2), **options)


def test_a_level_and_a_contract_may_be_texts() -> None:
    model = nn.Linear(2, 2)
    found = verify(model, model, torch.ones(1, 2), level="thorough", contract="exact")
    assert found == verify(model, model, torch.ones(1, 2), contract=Contract.EXACT)
    assert len(found.cases) > 8 and found.level is Level.THOROUGH
