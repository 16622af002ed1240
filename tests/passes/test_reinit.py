"""Reinitialize on models: what is drawn, what is reset, what is left alone, and from which seed."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import models
from passes import Reinitialize, WeightNorm
from rewrite.errors import OptionError
from rewrite.outcomes import Contract
from rewrite.pipeline import convert

ALL = sorted(models.all_models())


def reinit(model, *passes, **options):
    """Return the result of the passes, or of Reinitialize with these options."""
    calibration = options.pop("calibration", None)
    chosen = passes or (Reinitialize(**options),)
    return convert(model, list(chosen), calibration=calibration, verify=False)


@pytest.mark.parametrize("name", ALL)
def test_finite_forward_and_backward_and_repeatable(name):
    model, inputs = models.build(name)
    # Layers that no norm scales are drawn too.
    first = reinit(model, residual="zero").model
    second = reinit(model, residual="zero").model
    for (key, one), two in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key
    assert first.state_dict().keys() == model.state_dict().keys()
    assert len(list(first.parameters())) == len(list(model.parameters()))
    outputs = torch.utils._pytree.tree_leaves(first(*inputs))
    floating = [o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point()]
    assert all(torch.isfinite(o).all() for o in floating)
    if any(o.requires_grad for o in floating):
        sum(o.double().sum() for o in floating).backward()
    for parameter in first.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_every_kind_of_tensor_is_reset():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.GroupNorm(2, 4), nn.Flatten(),
        nn.Linear(4, 4), nn.LayerNorm(4),
    )  # fmt: skip
    models.randomize_norms_(model)
    with torch.no_grad():
        model[0].bias.fill_(3)
        model[2].weight.fill_(3)
    out = reinit(model, scheme="he:relu").model
    for norm in (out[1], out[3], out[6]):
        assert torch.equal(norm.weight, torch.ones(4))
        assert not norm.bias.any()
    assert not out[1].running_mean.any()
    assert torch.equal(out[1].running_var, torch.ones(4))
    assert out[1].num_batches_tracked == 0
    assert not out[0].bias.any()
    assert out[2].weight.item() == 0.25
    assert not torch.equal(out[0].weight, model[0].weight)
    assert model[0].bias[0] == 3  # the argument is untouched


# -- gains ---------------------------------------------------------------------------------------


def test_mode_of_the_whole_pass():
    model = nn.Sequential(nn.Linear(1000, 250))
    out = reinit(model, mode="fan_out", activation="linear").model
    assert out[0].weight.std().item() == pytest.approx(1 / math.sqrt(250), rel=5e-3)


def test_weights_that_code_applies():
    model, _ = models.build("functional_conv")
    out = reinit(model)
    assert any("gain" in change.after for change in out.report.changes)
    assert not torch.equal(out.model.kernel, model.kernel)


# -- packed weights ------------------------------------------------------------------------------


def test_tied_weights_once_at_the_scale_of_the_decoder():
    model = nn.Sequential(nn.Embedding(500, 100), nn.Linear(100, 500, bias=False))
    model[1].weight = model[0].weight
    result = reinit(model)
    assert result.model[0].weight is result.model[1].weight
    assert result.model[0].weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert len(result.report.changes) == 1


# -- through parametrizations --------------------------------------------------------------------


def old_style(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("scheme", ["he", "zeros"])
@pytest.mark.parametrize(
    "normed",
    [old_style, nn.utils.parametrizations.weight_norm, lambda m: convert(m, [WeightNorm()]).model],
    ids=["old", "torch", "ours"],
)
def test_writes_through_weight_norm(normed, scheme):
    model = nn.Sequential(normed(nn.Linear(6, 4)))
    # What people do, and what it does not do:
    weight = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    model(torch.ones(1, 6))
    torch.testing.assert_close(model[0].weight, weight)
    out = reinit(model, scheme=scheme).model
    plain = reinit(nn.Sequential(nn.Linear(6, 4)), scheme=scheme).model
    x = torch.randn(3, 6)
    torch.testing.assert_close(out(x), plain(x))
    out(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in out.parameters())
    torch.testing.assert_close(model[0].weight, weight)


def test_writes_through_other_parametrizations():
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))
    out = reinit(model, scheme="orthogonal").model
    plain = reinit(nn.Sequential(nn.Linear(4, 4)), scheme="orthogonal").model
    torch.testing.assert_close(out[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)


def test_a_parametrization_without_inverse_is_declined():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    report = reinit(model).report
    assert "without right_inverse" in report.skips[0].reason


# -- rules ---------------------------------------------------------------------------------------


def test_free_parameters():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 400, 50))
            self.fc = nn.Linear(50, 50)

        def forward(self, x):
            return self.fc(x + self.pos_embed)

    report = reinit(Tokens()).report
    assert [s.target for s in report.skips] == [""]
    assert "free parameter" in report.skips[0].reason
    out = reinit(Tokens(), scheme="pos_embed=trunc_normal;*=he").model
    assert out.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)


def test_frozen_parameters_only_on_request():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    result = reinit(model)
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert "frozen" in result.report.skips[0].reason
    out = reinit(model, frozen=True).model
    assert not torch.equal(out[0].weight, model[0].weight)
    assert not out[0].weight.requires_grad


def test_orthogonal_on_a_shape_that_has_none():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x * self.token

    report = reinit(Vector(), scheme="orthogonal").report
    assert "orthogonal needs" in report.skips[0].reason
    report = reinit(nn.Sequential(nn.Linear(3, 3)), scheme="dirac").report
    assert "dirac needs" in report.skips[0].reason


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "hee"}, "unknown scheme 'hee'"),
        ({"scheme": "@convv=he"}, "unknown layer kind 'convv'; known are linear"),
        ({"scheme": ""}, "no scheme"),
        ({"mode": "fan"}, "unknown mode 'fan'; known are fan_in"),
        ({"activation": "rellu"}, "unknown activation 'rellu'"),
        ({"residual": "one"}, "known are none, zero"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(OptionError, match=said):
        Reinitialize(**options)


# -- seeds ---------------------------------------------------------------------------------------


def test_a_change_in_one_layer_does_not_reshuffle_the_others():
    one = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    other = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Identity())
    first, second = reinit(one).model, reinit(other).model
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, reinit(one, seed=1).model[1].weight)
    # Nor does the state of the global generator, which is left as it was.
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(reinit(one).model[2].weight, first[2].weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_in_every_dtype_and_format():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    single = reinit(model).model[0].weight
    double = reinit(copy.deepcopy(model).double()).model[0].weight
    last = reinit(copy.deepcopy(model).to(memory_format=torch.channels_last)).model[0].weight
    assert torch.equal(double.float(), single)
    assert torch.equal(last, single)
    assert last.is_contiguous(memory_format=torch.channels_last)
    half = reinit(copy.deepcopy(model).bfloat16()).model[0].weight
    assert torch.equal(half, single.bfloat16())


# -- residual branches ---------------------------------------------------------------------------


# -- LSUV ----------------------------------------------------------------------------------------


def test_contract():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    result = convert(model, [Reinitialize()], example_inputs=(torch.randn(2, 3),))
    assert Reinitialize.contract is Contract.REDEFINING
    assert result.report.passes[0].violations == ()
