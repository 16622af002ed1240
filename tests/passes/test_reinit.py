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
from rewrite.init.gains import gain
from rewrite.outcomes import Contract
from rewrite.pipeline import convert
from rewrite.registry import parse, spec

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


class Followed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1000)
        self.drop = nn.Dropout()
        self.layers = nn.ModuleList(nn.Linear(1000, 1000) for _ in range(6))
        self.slope = nn.LeakyReLU(0.3)

    def forward(self, x):
        x = self.drop(self.norm(self.layers[0](x))).relu()
        x = self.slope(self.layers[1](x))
        x = nn.functional.gelu(self.layers[2](x).reshape(-1, 1000))
        x = self.layers[3](x)
        y = torch.tanh(x + self.layers[4](x))
        return self.layers[5](y)


class ZeroCentredNorm(nn.Module):
    """Scales by 1 + weight, as Gemma's RMSNorm does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x):
        return nn.functional.rms_norm(x, (4,)) * (1 + self.weight)


class ResponseNorm(nn.Module):
    """Adds to its input, as the global response norm of ConvNeXt V2 does; channels last."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * (x * size / size.mean(-1, keepdim=True)) + self.bias


class NormAct(nn.BatchNorm2d):
    """A norm and an activation that is not zero at zero."""

    def forward(self, x):
        return super().forward(x).sigmoid()


@pytest.mark.parametrize(
    ("kind", "value"), [(ZeroCentredNorm, 0.0), (ResponseNorm, 0.0), (lambda: NormAct(4), 1.0)]
)
def test_norms_of_other_packages_become_their_identity(kind, value):
    model = nn.Sequential(kind())
    state = torch.get_rng_state()
    out = reinit(model).model[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out.weight, torch.full((4,), value))
    if isinstance(out, ResponseNorm):
        x = torch.randn(2, 3, 3, 4)
        assert torch.equal(out(x), x)


def test_gain_is_that_of_the_activation_that_follows():
    result = reinit(Followed())
    gains = ["relu", None, "gelu", "tanh", "tanh", "linear"]
    for layer, name in zip(result.model.layers, gains, strict=True):
        factor = gain("leaky_relu", 0.3) if name is None else gain(name)
        assert layer.weight.std().item() == pytest.approx(factor / math.sqrt(1000), rel=5e-3)
    said = [c.after for c in result.report.changes if c.target.startswith("layers")]
    assert "relu" in said[0]
    assert "leaky_relu" in said[1]
    assert "no activation" in said[5]


def test_an_activation_that_is_given_wins_over_the_graph():
    out = reinit(Followed(), activation="linear").model
    assert out.layers[0].weight.std().item() == pytest.approx(1 / math.sqrt(1000), rel=5e-3)
    out = reinit(Followed(), scheme="glorot:normal").model
    assert out.layers[0].weight.std().item() == pytest.approx(1 / math.sqrt(1000), rel=5e-3)


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


def test_each_gate_by_itself_and_the_forget_bias():
    lstm = nn.LSTM(8, 8, num_layers=2)
    out = reinit(lstm, scheme="orthogonal", forget_bias=1.0).model
    for name, parameter in out.named_parameters():
        if name.startswith("weight"):
            for block in parameter.split(8):
                torch.testing.assert_close(block @ block.T, torch.eye(8))
        else:
            forget = 1.0 if name.startswith("bias_ih") else 0.0
            assert parameter[8:16].tolist() == [forget] * 8
            assert not torch.cat([parameter[:8], parameter[16:]]).any()
    x = torch.randn(3, 1, 8)
    again = nn.LSTM(8, 8, num_layers=2)
    again.load_state_dict(out.state_dict())
    assert torch.equal(again(x)[0], out(x)[0])  # the layer computes with its new weights


def test_attention_by_projection():
    out = reinit(nn.MultiheadAttention(8, 2), scheme="orthogonal").model
    for block in out.in_proj_weight.split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(8))
    assert not out.in_proj_bias.any()


def test_padding_row_stays_zero():
    out = reinit(nn.Embedding(5, 4, padding_idx=2)).model
    assert not out.weight[2].any()
    assert out.weight[[0, 1, 3, 4]].all()


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


def test_first_rule_wins():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2))
    out = reinit(model, scheme="3=zeros;@linear=orthogonal;*=he:fan_out").model
    assert not out[3].weight.any()
    torch.testing.assert_close(out[2].weight @ out[2].weight.T, torch.eye(2))
    assert out[0].weight.any()


def test_rules_from_flags():
    assert Reinitialize.from_flag(["he"]) == Reinitialize(scheme="he")
    built = Reinitialize.from_flag(["head*=zeros", "*=he:fan_out:leaky_relu=0.2"])
    assert [r.pattern for r in built.rules()] == ["head*", "*"]
    assert built.rules()[1].scheme.activation == "leaky_relu=0.2"
    assert Reinitialize.flag_value == "SCHEME"
    for options in (built, Reinitialize(seed=3, residual="zero", lsuv=True)):
        assert parse(spec(options)) == options


def test_what_no_rule_names_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    models.randomize_norms_(model)
    result = reinit(model, scheme="2=zeros")
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert torch.equal(result.model[1].weight, model[1].weight)
    assert torch.equal(result.model[1].running_var, model[1].running_var)
    assert {s.target for s in result.report.skips} == {"0", "1"}


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


def test_a_pattern_that_matches_nothing_names_close_ones():
    model = nn.Sequential()
    model.add_module("classifier", nn.Linear(3, 3))
    with pytest.raises(OptionError, match=r"clasifier\*=zeros.* no layer.* classifier"):
        reinit(model, scheme="clasifier*=zeros;*=he")


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


def blocks(count: int, norm: bool) -> nn.Sequential:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4) if norm else nn.Identity()

        def forward(self, x):
            return x + self.norm(self.two(self.one(x).relu()))

    return nn.Sequential(*[Block() for _ in range(count)])


@pytest.mark.parametrize("norm", [False, True])
def test_depth_scaling(norm):
    plain = reinit(blocks(8, norm)).model
    scaled = reinit(blocks(8, norm), residual="depth").model
    for one, two in zip(plain, scaled, strict=True):
        last, other = (one.norm, two.norm) if norm else (one.two, two.two)
        torch.testing.assert_close(other.weight, last.weight / math.sqrt(8))
        assert torch.equal(one.one.weight, two.one.weight)


def test_fixup():
    plain = reinit(blocks(8, False)).model
    fixed = reinit(blocks(8, False), residual="fixup").model
    for one, two in zip(plain, fixed, strict=True):
        torch.testing.assert_close(two.one.weight, one.one.weight * 8 ** (-1 / 2))
        assert not two.two.weight.any()


def test_residual_zeros_respect_the_selection():
    result = convert(blocks(2, True), [Reinitialize(residual="zero")], only=["0.*"], verify=False)
    assert not result.model[0].norm.weight.any()
    assert result.model[1].norm.weight.all()


# -- LSUV ----------------------------------------------------------------------------------------


def test_lsuv_gives_unit_variance_to_every_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )  # fmt: skip
    x = 2 + 5 * torch.randn(16, 3, 8, 8)
    result = reinit(model, scheme="orthogonal", lsuv=True, tolerance=1e-3, calibration=[x])
    seen = []
    for layer in (result.model[0], result.model[2], result.model[5]):
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out.var(correction=0).item()))
    result.model(x)
    assert seen == pytest.approx([1, 1, 1], abs=1e-3)
    assert "variance" in result.report.changes[0].note
    plain = reinit(model, scheme="orthogonal").model
    assert plain[0](x).var().item() > 5


def test_lsuv_without_data():
    with pytest.raises(OptionError, match="calibration"):
        reinit(nn.Linear(3, 3), lsuv=True)


def test_lsuv_with_a_constant_output_names_the_layer():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"^0: the output has variance 0"):
        out = reinit(model, lsuv=True, calibration=[torch.zeros(4, 3)]).model
    assert torch.isfinite(out[0].weight).all()


def test_contract():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    result = convert(model, [Reinitialize()], example_inputs=(torch.randn(2, 3),))
    assert Reinitialize.contract is Contract.REDEFINING
    assert result.report.passes[0].violations == ()
