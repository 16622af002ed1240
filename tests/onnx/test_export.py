"""Export: names, dynamic axes, metadata, traps met before the exporter, nothing half written."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rewrite.equivalence.verification import Level
from rewrite.errors import CheckpointError, ExportError, OptionError
from rewrite.onnx.export import check_exportable, export
from rewrite.onnx.feeds import dynamic_axes
from rewrite.onnx.file import open_onnx
from rewrite.onnx.verify import verify_onnx
from tests.equivalence.networks import Branches

X = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def test_an_export_is_verified_and_says_where_it_came_from(tmp_path, small):
    found = export(small, tmp_path / "net.onnx", example_inputs=(X,), metadata={"source": "a test"})
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


def test_inputs_that_nobody_gave_are_called_inferred(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    inferred = str(export(model, tmp_path / "a.onnx"))
    given = str(export(model, tmp_path / "b.onnx", example_inputs=(X,)))
    assert "(inferred)" in inferred and "(given)" not in inferred
    assert "(given)" in given and "inferred" not in given


def test_a_fixed_batch_and_an_opset_on_request(tmp_path, small):
    found = export(small, tmp_path / "net.onnx", example_inputs=(X,), dynamic_batch=False, opset=18)
    assert found.ok
    assert found.opset == 18
    assert dynamic_axes(open_onnx(tmp_path / "net.onnx")) == {"image": {}}


def test_external_data_lies_beside_the_model(tmp_path, small):
    found = export(small, tmp_path / "net.onnx", example_inputs=(X,), external_data=True)
    assert found.ok, str(found)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]


def test_the_verification_is_no_formality(tmp_path, small):
    path = tmp_path / "net.onnx"
    export(small, path, example_inputs=(X,))
    small.conv.weight = nn.Parameter(small.conv.weight.detach() * (1 + 1e-3))
    assert not verify_onnx(path, small, (X,)).ok


@pytest.mark.parametrize("bake", [True, False])
def test_weight_norm_is_baked_or_kept_by_choice(tmp_path, small, bake):
    weight_norm(small.conv)
    found = export(small, tmp_path / "net.onnx", example_inputs=(X,), bake_weight_norm=bake)
    assert found.ok, str(found)
    assert any("baked" in note for note in found.notes) == bake
    assert hasattr(small.conv, "parametrizations")


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
def test_a_trap_is_met_before_the_export(tmp_path, small, trap, words):
    trap(small)
    with pytest.raises(ExportError) as error:
        export(small, tmp_path / "net.onnx", example_inputs=(X,))
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_what_is_no_trap_is_let_through():
    check_exportable(nn.Sequential(nn.InstanceNorm2d(3), nn.Dropout(0.0), nn.GroupNorm(1, 3)))


# GroupNormalization changes at 21; what stands between 18 and that differs in no norm.
@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.slow), 21])
@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 6, 6])],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_are_right_at_every_opset(tmp_path, small, norm, opset):
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    small.norm = norm.eval()
    found = export(small, tmp_path / "net.onnx", example_inputs=(X,), opset=opset)
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


@pytest.mark.parametrize("options", [{"level": "nonsense"}, {"exporter": "nonsense"}])
def test_an_unknown_level_or_exporter_is_refused_before_anything_is_done(tmp_path, small, options):
    (name,) = options
    with pytest.raises(OptionError, match=f"{name} is 'nonsense'; pass (quick|dynamo), t"):
        export(small, tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_costs_no_export(tmp_path, small):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        export(small, tmp_path / "nowhere" / "net.onnx", example_inputs=(X,))
    taken = tmp_path / "net.onnx"
    taken.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="already exists"):
        export(small, taken, example_inputs=(X,), overwrite=False)
    assert taken.read_bytes() == b"mine"


def test_without_any_known_input_the_error_says_what_to_pass(tmp_path):
    with pytest.raises(ExportError, match="--input"):
        export(nn.Bilinear(2, 3, 4), tmp_path / "net.onnx")


def test_the_model_is_untouched(tmp_path, small):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    export(small, Path(tmp_path) / "net.onnx", example_inputs=(X,))
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
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


A, B = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 1, 6).reshape(3, 2)


class Shifts(nn.Module):
    def forward(self, x):
        return (x ^ (x >> 3)) & 15


@pytest.mark.parametrize(
    ("model", "x"), [(Shifts(), torch.arange(12).reshape(3, 4)), (Branches(), A)]
)
def test_shifts_and_branches_are_exported(tmp_path, model, x):
    found = export(model.eval(), tmp_path / "x.onnx", example_inputs=(x,))
    assert found.ok, str(found)


def test_what_was_not_verified_does_not_say_so(tmp_path, small):
    found = export(small, tmp_path / "net.onnx", example_inputs=(X,), verify=False)
    assert str(found).startswith(f"{tmp_path / 'net.onnx'}: not verified")
    assert found.to_dict()["verdict"] == "not verified"
    assert list(found.tables())
    assert export(small, tmp_path / "net.onnx", example_inputs=(X,)).verdict == "verified"


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
