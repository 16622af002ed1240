"""Export: names, dynamic axes, metadata, traps met before the exporter, nothing half written."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import resnet18

import models
from rewrite.equivalence.verification import Level
from rewrite.errors import CheckpointError, ExportError, OptionError
from rewrite.onnx.export import check_exportable, export
from rewrite.onnx.feeds import dynamic_axes
from rewrite.onnx.file import open_onnx
from rewrite.onnx.values import scope_of
from rewrite.onnx.verify import verify_onnx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, image, scale=None):
        x = self.drop(torch.relu(self.norm(self.conv(image))))
        return {"features": x if scale is None else x * scale, "pooled": x.mean((2, 3))}


X = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


@pytest.fixture
def net() -> nn.Module:
    return models.randomize_norms_(Net()).eval()


def test_an_export_is_verified_and_says_where_it_came_from(tmp_path, net):
    found = export(net, tmp_path / "net.onnx", example_inputs=(X,), metadata={"source": "a test"})
    assert found.ok, str(found)
    assert found.divergence is None
    opened = open_onnx(tmp_path / "net.onnx")
    assert [value.name for value in opened.inputs] == ["image"]
    assert [value.name for value in opened.model.graph.output] == ["features", "pooled"]
    assert dynamic_axes(opened) == {"image": {0: "batch"}}
    properties = {item.key: item.value for item in opened.model.metadata_props}
    assert properties["rewrite.source"] == "a test"
    assert properties["torch.version"] == torch.__version__
    keys = {item.key for node in opened.model.graph.node for item in node.metadata_props}
    assert "pkg.torch.onnx.name_scopes" in keys
    assert "pkg.torch.onnx.stack_trace" not in keys
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx"]


def test_more_axes_are_dynamic_on_request(tmp_path, net):
    found = export(
        net,
        tmp_path / "net.onnx",
        example_inputs=(X,),
        dynamic_shapes={"image": {2: "height", 3: "width"}},
    )
    assert found.ok, str(found)
    bigger = torch.ones(5, 3, 11, 13)
    assert verify_onnx(tmp_path / "net.onnx", net, (bigger,)).ok


def test_a_fixed_batch_and_an_opset_on_request(tmp_path, net):
    found = export(net, tmp_path / "net.onnx", example_inputs=(X,), dynamic_batch=False, opset=18)
    assert found.ok
    assert found.opset == 18
    assert dynamic_axes(open_onnx(tmp_path / "net.onnx")) == {"image": {}}


def test_external_data_lies_beside_the_model(tmp_path, net):
    found = export(net, tmp_path / "net.onnx", example_inputs=(X,), external_data=True)
    assert found.ok, str(found)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]


def test_keyword_inputs_keep_their_names(tmp_path, net):
    inputs = {"image": torch.cat([X, X]), "scale": torch.ones(2, 1, 1, 1)}
    found = export(net, tmp_path / "net.onnx", example_inputs=inputs)
    assert found.ok, str(found)
    assert {value.name for value in open_onnx(tmp_path / "net.onnx").inputs} == {"image", "scale"}


def test_the_verification_is_no_formality(tmp_path, net):
    path = tmp_path / "net.onnx"
    export(net, path, example_inputs=(X,))
    net.conv.weight = nn.Parameter(net.conv.weight.detach() * (1 + 1e-3))
    assert not verify_onnx(path, net, (X,)).ok


@pytest.mark.parametrize("bake", [True, False])
def test_weight_norm_is_baked_or_kept_by_choice(tmp_path, net, bake):
    weight_norm(net.conv)
    found = export(net, tmp_path / "net.onnx", example_inputs=(X,), bake_weight_norm=bake)
    assert found.ok, str(found)
    assert any("baked" in note for note in found.notes) == bake
    assert hasattr(net.conv, "parametrizations")


def in_train_mode(model):
    model.train()


def only_the_dropout(model):
    model.drop.train()


def without_statistics(model):
    model.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()


@pytest.mark.parametrize(
    ("trap", "words"),
    [
        (in_train_mode, ("norm", "train mode", "model.eval()")),
        (only_the_dropout, ("drop", "train mode")),
        (without_statistics, ("norm", "no running statistics")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_trap_is_met_before_the_export(tmp_path, net, trap, words):
    trap(net)
    with pytest.raises(ExportError) as error:
        export(net, tmp_path / "net.onnx", example_inputs=(X,))
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_what_is_no_trap_is_let_through():
    check_exportable(nn.Sequential(nn.InstanceNorm2d(3), nn.Dropout(0.0), nn.GroupNorm(1, 3)))


@pytest.mark.parametrize("opset", [18, 20, 21])
@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 6, 6])],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_are_right_at_every_opset(tmp_path, net, norm, opset):
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    net.norm = norm.eval()
    found = export(net, tmp_path / "net.onnx", example_inputs=(X,), opset=opset)
    assert found.ok, str(found)
    assert found.opset == opset


class Upsampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.Upsample(scale_factor=4)

    def forward(self, x):
        return self.up(nn.functional.avg_pool2d(self.conv(x), 4)) + self.conv(x)


def test_rounding_a_weight_once_leaves_sizes_alone(tmp_path):
    """A scale of 4 that becomes 3.9999998 makes 15 rows of 4."""
    x = torch.randn(2, 3, 16, 16)
    found = export(Upsampled(), tmp_path / "up.onnx", example_inputs=(x,), level=Level.THOROUGH)
    assert found.ok, str(found)


class Tables(nn.Module):
    def __init__(self, other):
        super().__init__()
        table = torch.randn(128, 200)
        self.register_buffer("first", table)
        self.register_buffer("second", table.clone() + other)
        self.weight = nn.Parameter(table.clone())

    def forward(self, x):
        return (x @ self.first).relu() + (x @ self.second).tanh() + x @ self.weight


@pytest.mark.parametrize(("other", "kept"), [(0, ["weight"]), (1, ["second", "weight"])])
def test_equal_tensors_are_stored_once_under_the_name_of_the_parameter(tmp_path, other, kept):
    path = tmp_path / "tables.onnx"
    model, x = Tables(other).eval(), torch.randn(2, 128)
    found = export(model, path, example_inputs=(x,))
    assert found.ok, str(found)
    assert found.notes == (f"stored {3 - len(kept)} tensors once that are equal to others",)
    assert sorted(tensor.name for tensor in onnx.load(path).graph.initializer) == kept


class Loop(nn.Module):
    def forward(self, x):
        for _ in range(8):
            if x.abs().sum() < 100:
                x = x * 2
        return x


def test_what_the_exporter_refuses_is_one_line_and_leaves_no_file(tmp_path):
    with pytest.raises(ExportError, match=r"Loop: torch\.onnx\.export fails") as error:
        export(Loop(), tmp_path / "loop.onnx", example_inputs=(torch.ones(2, 2),))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("--exporter torchscript may trace it")
    assert not list(tmp_path.iterdir())


def test_a_trace_holds_for_its_own_input_and_other_inputs_tell(tmp_path):
    path, x = tmp_path / "loop.onnx", torch.rand(2, 2)
    wrong = export(Loop(), path, example_inputs=(x,), exporter="torchscript")
    assert any("batch 7: output[0] is off by" in reason for reason in wrong.reasons), str(wrong)
    found = export(Loop(), path, example_inputs=(x,), exporter="torchscript", dynamic_batch=False)
    assert found.ok, str(found)
    assert "branches are those of the given input" in found.notes[0]
    more = verify_onnx(path, Loop(), (x,))
    assert not more.ok
    assert any("output[0] is off by" in reason for reason in more.reasons), str(more)


def test_a_trace_keeps_names_and_dynamic_axes(tmp_path):
    path, model = tmp_path / "net.onnx", resnet18(num_classes=5).eval()
    axes = {"x": {2: "height", 3: "width"}}
    x = torch.randn(2, 3, 32, 32)
    found = export(
        model, path, example_inputs=(x,), dynamic_shapes=axes, exporter="torchscript", opset=18
    )
    assert found.ok, str(found)
    opened = open_onnx(path)
    assert opened.opset == 18
    assert dynamic_axes(opened) == {"x": {0: "batch", 2: "height", 3: "width"}}
    owners = {scope_of(node) for node in opened.model.graph.node if node.op_type == "Conv"}
    assert owners == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("options", [{"level": "nonsense"}, {"exporter": "nonsense"}])
def test_an_unknown_level_or_exporter_is_refused_before_anything_is_done(tmp_path, net, options):
    (name,) = options
    with pytest.raises(OptionError, match=f"{name} is 'nonsense'; pass (quick|dynamo), t"):
        export(net, tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [-1, 3, 99])
def test_an_opset_that_the_exporter_does_not_write_is_refused(tmp_path, net, opset):
    with pytest.raises(ExportError, match=f"--opset {opset}: "):
        export(net, tmp_path / "x.onnx", example_inputs=(X,), opset=opset)
    assert not list(tmp_path.iterdir())


def test_a_trace_of_an_opset_that_its_exporter_does_not_write_is_refused(tmp_path, net):
    with pytest.raises(ExportError, match="--opset 21: the exporter torchscript ends at 20"):
        export(net, tmp_path / "x.onnx", example_inputs=(X,), exporter="torchscript", opset=21)


def test_an_output_that_cannot_be_written_costs_no_export(tmp_path, net):
    with pytest.raises(CheckpointError):
        export(net, tmp_path / "nowhere" / "net.onnx", example_inputs=(X,))
    taken = tmp_path / "net.onnx"
    taken.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="already exists"):
        export(net, taken, example_inputs=(X,), overwrite=False)
    assert taken.read_bytes() == b"mine"


def test_without_any_known_input_the_error_says_what_to_pass(tmp_path):
    with pytest.raises(ExportError, match="--input"):
        export(nn.Bilinear(2, 3, 4), tmp_path / "net.onnx")


def test_the_model_is_untouched(tmp_path, net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export(net, Path(tmp_path) / "net.onnx", example_inputs=(X,))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert onnx.load(tmp_path / "net.onnx").graph.node


@pytest.mark.parametrize("bake", [True, False])
def test_a_weight_normed_lstm_is_exported(tmp_path, bake):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 6, batch_first=True)
            for name in ("weight_ih_l0", "weight_hh_l0"):
                weight_norm(self.lstm, name)

        def forward(self, x):
            return self.lstm(x)[0]

    x = torch.linspace(-1, 1, 30).reshape(2, 3, 5)
    found = export(Normed().eval(), tmp_path / "n.onnx", example_inputs=(x,), bake_weight_norm=bake)
    assert found.verdict == "verified"
    assert any("baked" in note for note in found.notes) == bake


class States(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x, h, c):
        return self.lstm(x, (h, c))[0]


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, *xs):
        return self.linear(xs[0]) + xs[1]


class InDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, batch):
        return self.linear(batch["a"]) + batch["b"]


A, B = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 1, 6).reshape(3, 2)
STATES = (torch.randn(2, 4, 5), torch.randn(1, 2, 6), torch.randn(1, 2, 6))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (States(), STATES),
        (Many(), (A, B)),
        (InDict(), ({"a": A, "b": B},)),
        (InDict(), {"batch": {"a": A, "b": B}}),
    ],
    ids=["states", "variadic", "a dict by position", "a dict by name"],
)
def test_every_form_of_inputs_has_a_dynamic_batch(tmp_path, model, inputs):
    found = export(model.eval(), tmp_path / "x.onnx", example_inputs=inputs)
    assert found.ok, str(found)
    assert "batch 7" in str(found)
    assert not found.notes


def test_the_batch_of_states_may_be_named(tmp_path):
    axes = {"x": {0: "batch"}, "h": {1: "batch"}, "c": {1: "batch"}}
    path = tmp_path / "x.onnx"
    found = export(States().eval(), path, example_inputs=STATES, dynamic_shapes=axes)
    assert found.ok, str(found)
    assert dynamic_axes(open_onnx(path)) == axes


class OneSize(nn.Module):
    def forward(self, x, y):
        return x.reshape(2, 6) @ y.reshape(6, 5)


def test_a_batch_that_stays_fixed_is_said(tmp_path):
    inputs = (torch.randn(3, 4), torch.randn(5, 6))
    found = export(OneSize(), tmp_path / "x.onnx", example_inputs=inputs)
    assert found.ok, str(found)
    assert any(note.startswith("the batch is fixed") for note in found.notes)


class Shifts(nn.Module):
    def forward(self, x):
        return (x ^ (x >> 3)) & 15


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(
            x.sum() > 0, lambda x: self.linear(x).relu(), lambda x: self.linear(x).tanh(), (x,)
        )


@pytest.mark.parametrize(
    ("model", "x"), [(Shifts(), torch.arange(12).reshape(3, 4)), (Branches(), A)]
)
def test_shifts_and_branches_are_exported(tmp_path, model, x):
    found = export(model.eval(), tmp_path / "x.onnx", example_inputs=(x,))
    assert found.ok, str(found)


def test_what_was_not_verified_does_not_say_so(tmp_path, net):
    found = export(net, tmp_path / "net.onnx", example_inputs=(X,), verify=False)
    assert str(found).startswith(f"{tmp_path / 'net.onnx'}: not verified")
    assert found.to_dict()["verdict"] == "not verified"
    assert list(found.tables())
    assert export(net, tmp_path / "net.onnx", example_inputs=(X,)).verdict == "verified"


class Windows(nn.Module):
    """Attention of five axes, which the exporter refuses in its fused form."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_attention_that_the_exporter_refuses_is_written_out(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 5, 8)
    found = export(Windows().eval(), tmp_path / "w.onnx", example_inputs=(x,))
    assert found.ok, str(found)
    assert any("attention is written out" in note for note in found.notes)
