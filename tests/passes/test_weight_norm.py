"""WeightNorm on models: exact, by layout, with ties; fitted to data; with mean-only norms."""

import copy
import warnings

import pytest
import torch
from torch import nn

import models
from passes import Reinitialize, RemoveWeightNorm, WeightNorm
from rewrite.checkpoint.load import load, save
from rewrite.errors import OptionError
from rewrite.outcomes import Contract
from rewrite.pipeline import convert
from rewrite.registry import parse, spec
from rewrite.runtime.copying import copy_model
from rewrite.weights.weight_norm import has_weight_norm, weight_normed

# The weight of functional_conv is applied by code; the other two come with a weight norm.
ALL = sorted(set(models.all_models()) - {"functional_conv", "parametrized_conv", "old_weight_norm"})


def run(model, inputs):
    copied = copy_model(model)  # the forward may move running statistics
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = torch.utils._pytree.tree_leaves(copied(*inputs))
    return [out for out in outputs if isinstance(out, torch.Tensor)]


def net(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.Tanh(), *extra,
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_exact_and_removed_bit_for_bit(name):
    model, inputs = models.build(name)
    normed = convert(model, [WeightNorm()], example_inputs=inputs, verify=False)
    assert normed.report.changes
    for was, now in zip(run(model, inputs), run(normed.model, inputs), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-10, equal_nan=True)
    removed = convert(normed.model, [RemoveWeightNorm()], example_inputs=inputs, verify=False).model
    before, after = model.state_dict(), removed.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)
    # By name: every copy of a GraphModule has a class of its own.
    names = [[type(m).__qualname__ for m in net.modules()] for net in (model, removed)]
    assert names[0] == names[1]


def test_the_contract_is_verified():
    model = net().double()
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    report = convert(model, [WeightNorm()], example_inputs=(x,)).report
    (applied,) = report.passes
    assert applied.verification.ok
    assert applied.violations == ()
    assert [c.target for c in report.changes] == ["0", "2", "6"]


def test_wrong_units_are_caught():
    """The negative twin: the norm of the inputs is another function once g moves."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3)).double()
    right = convert(model, [WeightNorm()], verify=False).model
    wrong = copy.deepcopy(model)
    torch.nn.utils.parametrizations.weight_norm(wrong[0], dim=0)
    g = right[0].parametrizations.weight.original0
    assert g.numel() == 6
    assert wrong[0].parametrizations.weight.original0.numel() == 4


def test_ties_survive():
    model, inputs = models.build("tied_embedding")
    count = len(list(model.parameters()))
    result = convert(model, [WeightNorm()], example_inputs=inputs, verify=False)
    tied = [c for c in result.report.changes if c.note]
    assert [c.note.startswith("tied to") for c in tied] == [True]
    assert len(list(result.model.parameters())) == count + len(result.report.changes)
    for parameter in result.model.parameters():
        parameter.data = parameter.data * 1.5
    removed = convert(result.model, [RemoveWeightNorm()], verify=False).model
    assert len(list(removed.parameters())) == count
    for was, now in zip(run(result.model, inputs), run(removed, inputs), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-12)


def test_old_style_is_converted_on_its_own_parameters():
    model, inputs = models.build("old_weight_norm")
    result = convert(model, [WeightNorm()], example_inputs=inputs, verify=False)
    change = next(c for c in result.report.changes if "old-style" in c.before)
    assert all(new in result.model.state_dict() for new in change.keys.values())
    for was, now in zip(run(model, inputs), run(result.model, inputs), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-12)
    renamed = {change.keys.get(k, k): v for k, v in model.state_dict().items()}
    for key in change.keys.values():
        assert torch.equal(result.model.state_dict()[key], renamed[key])


def test_keys_of_the_report():
    model = net()
    result = convert(model, [WeightNorm()], verify=False)
    moved = {old: new for c in result.report.changes for old, new in c.keys.items()}
    assert moved["0.weight"] == "0.parametrizations.weight.original1"
    for old, new in moved.items():
        assert torch.equal(model.state_dict()[old], result.model.state_dict()[new])
    back = convert(result.model, [RemoveWeightNorm()], verify=False)
    for change in back.report.changes:
        for old, new in change.keys.items():
            assert old in result.model.state_dict()
            assert new is None or new in back.model.state_dict()


def test_a_second_application_has_nothing_to_do():
    once = convert(net(), [WeightNorm()], verify=False).model
    again = convert(once, [WeightNorm()], verify=False).report
    assert not again.changes
    assert {s.reason for s in again.skips} == {"weight is weight-normed already"}
    plain = convert(net(), [RemoveWeightNorm()], verify=False).report
    assert not plain.changes


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        (WeightNorm(kinds="conv"), ["0", "2"]),
        (WeightNorm(kinds="linear, embedding"), ["6"]),
        (WeightNorm(min_size=200), ["0", "2"]),
    ],
)
def test_selection_by_kind_and_size(options, targets):
    report = convert(net(), [options], verify=False).report
    assert [c.target for c in report.changes] == targets
    assert len(report.skips) == 3 - len(targets)


def test_selection_by_name():
    report = convert(net(), [WeightNorm()], only=["0"], verify=False).report
    assert [c.target for c in report.changes] == ["0"]


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Initializing zero-element")
def test_declines():
    model = nn.ModuleDict(
        {
            "lazy": nn.LazyLinear(3),
            "sparse": nn.Embedding(4, 3, sparse=True),
            "bounded": nn.Embedding(4, 3, max_norm=1.0),
            "empty": nn.Linear(4, 0),
            "orthogonal": nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
            "integer": nn.Linear(3, 3),
        }
    )
    integer = torch.ones(3, 3, dtype=torch.int8)
    model["integer"].weight = nn.Parameter(integer, requires_grad=False)
    report = convert(model, [WeightNorm()], verify=False).report
    assert not report.changes
    reasons = {s.target: s.reason for s in report.skips}
    for target, said in [
        ("lazy", "lazy"),
        ("sparse", "sparse"),
        ("bounded", "max_norm"),
        ("empty", "empty"),
        ("orthogonal", "another parametrization"),
        ("integer", "int8"),
    ]:
        assert said in reasons[target]


def test_declines_a_weight_applied_by_code():
    model, inputs = models.build("functional_conv")
    report = convert(model, [WeightNorm()], example_inputs=inputs, verify=False).report
    assert "applied by code" in report.skips[0].reason


def test_declines_a_quantized_weight():
    model = nn.Sequential(nn.Linear(4, 4))

    class Packed(torch.Tensor):
        pass

    model[0].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Packed))
    report = convert(model, [WeightNorm()], verify=False).report
    assert "tensor class" in report.skips[0].reason


def test_declines_an_integer_weight_and_a_packed_int8_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what builds int8 layers
        packed = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), packed, nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for options in (WeightNorm(), Reinitialize(frozen=True)):
        report = convert(model, [options], verify=False).report
        reasons = {skip.target: skip.reason for skip in report.skips if "bias" not in skip.reason}
        assert [c.target for c in report.changes if c.target != "0"] == ["2"]
        assert "int8" in reasons["0"] or "not floating point" in reasons["0"]
        assert "quantized" in reasons["1"]


def test_declines_ties_to_something_else():
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:, :, None].clone())
    model[0].register_parameter("spare", model[0].weight)
    report = convert(model, [WeightNorm()], verify=False).report
    assert [c.target for c in report.changes] == ["1"]
    assert "is tied to 0.spare" in report.skips[0].reason


def test_frozen_and_half_precision_models():
    model = net().to(torch.bfloat16).requires_grad_(False)
    normed = convert(model, [WeightNorm()], verify=False).model
    assert not any(p.requires_grad for p in normed.parameters())
    assert {p.dtype for p in normed.parameters()} == {torch.bfloat16}
    assert torch.equal(normed[0].weight, model[0].weight)


def test_saved_and_loaded(tmp_path):
    normed = convert(net(), [WeightNorm()], verify=False).model
    x = torch.randn(2, 3, 10, 10)
    read = load(save(normed, tmp_path / "normed.pt"))
    assert torch.equal(read(x), normed(x))
    assert weight_normed(read[0]) == ("weight",)
    fresh = convert(net(), [WeightNorm()], verify=False).model
    fresh.load_state_dict(normed.state_dict())
    assert torch.equal(fresh(x), normed(x))


@pytest.mark.parametrize("removed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exports_kept_and_baked(removed, tmp_path):
    import onnxruntime

    model = convert(net(), [WeightNorm()], verify=False).model.eval()
    if removed:
        model = convert(model, [RemoveWeightNorm()], verify=False).model
    x = torch.randn(2, 3, 10, 10)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-4, atol=1e-5)


# -- data-dependent initialization ---------------------------------------------------------------


def preactivations(model, x, layers):
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        model.eval()(x)
    return seen


def test_data_init_without_data():
    with pytest.raises(OptionError, match="calibration"):
        convert(net(), [WeightNorm(data_init=True)], verify=False)


# -- mean-only batch norm ------------------------------------------------------------------------


def test_mean_only_with_data_init_standardizes():
    model = net().double()
    x = 3 + torch.randn(16, 3, 10, 10, dtype=torch.float64)
    options = WeightNorm(mean_only=True, data_init=True)
    assert options.contract is Contract.REDEFINING
    out = convert(model, [options], calibration=[x], verify=False).model
    seen = preactivations(out, x, {n: out.get_submodule(f"{n}.mean") for n in ("0", "2", "6")})
    for value in seen.values():
        flat = value.movedim(1, 0).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros_like(flat[:, 0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones_like(flat[:, 0]))
    torch.testing.assert_close(out.train()(x), out.eval()(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": "convv"}, "unknown layer kind 'convv'; known are linear"),
        ({"min_size": -1}, "min_size"),
        ({"momentum": 0.0}, "momentum"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(OptionError, match=said):
        WeightNorm(**options)


def test_spec_text():
    for options in (WeightNorm(), WeightNorm(kinds="conv,linear", data_init=True)):
        assert parse(spec(options)) == options
    assert WeightNorm().contract is Contract.EXACT
    assert has_weight_norm(convert(net(), ["weight-norm"], verify=False).model[0], "weight")


class MovesItsEncoder(nn.Module):
    """A momentum encoder: the parameters of one layer move towards those of another."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        with torch.no_grad():
            for p, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                p.lerp_(q, 0.1)
        return self.query(x), self.key(x)


class Still(MovesItsEncoder):
    def forward(self, x):
        return self.query(x), self.key(x)


@pytest.mark.parametrize("spec", ["weight-norm", "weight-standardize{kinds=linear}"])
def test_layers_all_of_whose_parameters_code_reads_stay(spec):
    x = torch.randn(2, 3, dtype=torch.float64)
    model = MovesItsEncoder().double().eval()
    report = convert(model, [spec], example_inputs=(x,)).report
    assert not report.changes
    assert all(".parameters()" in skip.reason for skip in report.skips) and len(report.skips) == 2
    assert len(convert(Still().double().eval(), [spec], example_inputs=(x,)).report.changes) == 2
