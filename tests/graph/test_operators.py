"""One operator, many spellings: each must be read as the same thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import models
from rewrite.graph.capture import capture
from rewrite.graph.captured import Captured
from rewrite.graph.operators import activation_of, conv_of, linear_of, norm_of
from rewrite.graph.spellings import function_name

aten = torch.ops.aten


def found(captured: Captured, reader: Any) -> list[Any]:
    return [item for node in captured.nodes() if (item := reader(captured, node)) is not None]


def only(model: nn.Module, reader: Any) -> Any:
    (item,) = found(capture(model), reader)
    return item


class Lines(nn.Module):
    """A forward given as a function of the module and its input."""

    def __init__(self, line: Any, **tensors: Tensor) -> None:
        super().__init__()
        self.line = line
        for name, tensor in tensors.items():
            if name.startswith("running"):
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self, x)


def statistics() -> dict[str, Tensor]:
    return {
        "weight": torch.rand(4) + 0.5,
        "bias": torch.randn(4),
        "running_mean": torch.randn(4),
        "running_var": torch.rand(4) + 0.5,
    }


class Inherits(nn.BatchNorm2d):
    pass


class CallsSuper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


BATCH_NORMS = {
    "module": lambda: nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)),
    "subclass that inherits": lambda: nn.Sequential(Inherits(4, eps=1e-3)),
    "subclass that calls super": lambda: nn.Sequential(CallsSuper(4, eps=1e-3)),
    "sync": lambda: nn.Sequential(nn.SyncBatchNorm(4, eps=1e-3)),
    "F, positional": lambda: Lines(
        lambda m, x: F.batch_norm(
            x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.1, 1e-3
        ),
        **statistics(),
    ),
    "F, keywords": lambda: Lines(
        lambda m, x: F.batch_norm(
            x,
            running_var=m.running_var,
            running_mean=m.running_mean,
            bias=m.bias,
            weight=m.weight,
            eps=1e-3,
        ),
        **statistics(),
    ),
    "torch": lambda: Lines(
        lambda m, x: torch.batch_norm(
            x, m.weight, m.bias, m.running_mean, m.running_var, False, 0.1, 1e-3, True
        ),
        **statistics(),
    ),
    "aten": lambda: Lines(
        lambda m, x: aten.batch_norm.default(
            x, m.weight, m.bias, m.running_mean, m.running_var, False, 0.1, 1e-3, True
        ),
        **statistics(),
    ),
}


@pytest.mark.parametrize("spelling", BATCH_NORMS)
def test_a_batch_norm_in_every_spelling(spelling: str):
    model = BATCH_NORMS[spelling]().eval()
    norm = only(model, norm_of)
    assert (norm.kind, norm.eps, norm.training, norm.num_features) == ("batch", 1e-3, False, 4)
    refs = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    assert [ref.attr for ref in refs] == ["weight", "bias", "running_mean", "running_var"]
    assert norm.input.op == "placeholder"
    assert norm.channel_axis == 1


def test_an_exported_batch_norm_is_read_with_its_named_parameters():
    model, inputs = models.build("residual")
    gm = torch.export.export(model.eval(), inputs).module()
    norms = found(capture(gm), norm_of)
    assert [norm.weight.name for norm in norms] == ["bn1.weight", "bn2.weight"]
    assert not any(norm.training for norm in norms)
    assert [conv.weight.name for conv in found(capture(gm), conv_of)] == [
        "conv1.weight", "conv2.weight",
    ]  # fmt: skip


def test_a_decomposed_export_is_read_too():
    model, inputs = models.build("residual")
    gm = torch.export.export(model.eval(), inputs).run_decompositions().module()
    assert len(found(capture(gm), norm_of)) == len(found(capture(gm), conv_of)) == 2


@pytest.mark.parametrize(
    ("norm", "training"),
    [
        (nn.BatchNorm2d(4).train(), True),
        (nn.BatchNorm2d(4).eval(), False),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), True),
        (nn.InstanceNorm2d(4).eval(), True),
        (nn.InstanceNorm2d(4, track_running_stats=True).eval(), False),
        (nn.GroupNorm(2, 4).eval(), True),
        (nn.LayerNorm(4).eval(), True),
    ],
)
def test_training_says_whether_a_norm_looks_at_its_batch(norm: nn.Module, training: bool):
    assert only(nn.Sequential(norm), norm_of).training is training


def test_an_affine_free_norm_has_no_weight():
    norm = only(nn.Sequential(nn.BatchNorm2d(4, affine=False)).eval(), norm_of)
    assert norm.weight is None and norm.bias is None
    assert norm.num_features == 4


def test_a_beta_that_was_removed_is_none_whatever_affine_says():
    norm = only(models.build("bias_free")[0], norm_of)
    assert norm.weight is not None and norm.bias is None


def test_a_lazy_norm_is_no_norm_yet():
    assert found(capture(nn.Sequential(nn.LazyBatchNorm2d())), norm_of) == []


def test_a_norm_with_a_computed_weight_is_not_taken_for_one_with_none():
    model = Lines(
        lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, m.weight * 2, m.bias),
        **statistics(),
    )
    assert found(capture(model), norm_of) == []


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("group", nn.GroupNorm(2, 4)),
        ("layer", nn.LayerNorm([4, 5])),
        ("instance", nn.InstanceNorm1d(4, affine=True)),
        ("rms", nn.RMSNorm(4)),
    ],
)
def test_other_norms_have_their_kind(kind: str, norm: nn.Module):
    assert only(nn.Sequential(norm), norm_of).kind == kind


CONVS = {
    "module": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, 2, 2)),
    "F": lambda: Lines(
        lambda m, x: F.conv2d(x, m.weight, m.bias, 2, 1, 2, 2),
        weight=torch.randn(6, 2, 3, 3), bias=torch.randn(6),
    ),
    "torch": lambda: Lines(
        lambda m, x: torch.conv2d(x, m.weight, m.bias, (2, 2), (1, 1), (2, 2), 2),
        weight=torch.randn(6, 2, 3, 3), bias=torch.randn(6),
    ),
    "F, keywords": lambda: Lines(
        lambda m, x: F.conv2d(
            x, m.weight, groups=2, dilation=2, padding=1, stride=2, bias=m.bias
        ),
        weight=torch.randn(6, 2, 3, 3), bias=torch.randn(6),
    ),
    "aten.conv2d": lambda: Lines(
        lambda m, x: aten.conv2d.default(x, m.weight, m.bias, [2, 2], [1, 1], [2, 2], 2),
        weight=torch.randn(6, 2, 3, 3), bias=torch.randn(6),
    ),
    "aten.convolution": lambda: Lines(
        lambda m, x: aten.convolution.default(
            x, m.weight, m.bias, [2, 2], [1, 1], [2, 2], False, [0, 0], 2
        ),
        weight=torch.randn(6, 2, 3, 3), bias=torch.randn(6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", CONVS)
def test_a_convolution_in_every_spelling(spelling: str):
    conv = only(CONVS[spelling](), conv_of)
    assert (conv.stride, conv.padding, conv.dilation, conv.groups) == ((2, 2), (1, 1), (2, 2), 2)
    assert (conv.transposed, conv.dims, conv.padding_mode) == (False, 2, "zeros")
    assert (conv.weight.attr, conv.bias.attr) == ("weight", "bias")


TRANSPOSED = {
    "module": lambda: nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2)
    ),
    "F": lambda: Lines(
        lambda m, x: F.conv_transpose1d(x, m.weight, m.bias, 2, 1, 1, 2),
        weight=torch.randn(4, 3, 3), bias=torch.randn(6),
    ),
    "torch": lambda: Lines(
        lambda m, x: torch.conv_transpose1d(x, m.weight, m.bias, [2], [1], [1], 2),
        weight=torch.randn(4, 3, 3), bias=torch.randn(6),
    ),
    "aten.convolution": lambda: Lines(
        lambda m, x: aten.convolution.default(
            x, m.weight, m.bias, [2], [1], [1], True, [1], 2
        ),
        weight=torch.randn(4, 3, 3), bias=torch.randn(6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", TRANSPOSED)
def test_a_transposed_convolution_in_every_spelling(spelling: str):
    conv = only(TRANSPOSED[spelling](), conv_of)
    assert conv.transposed
    assert (conv.stride, conv.padding, conv.output_padding) == ((2,), (1,), (1,))
    assert (conv.groups, conv.dilation, conv.dims) == (2, (1,), 1)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_stays_a_name(padding: str):
    assert only(nn.Sequential(nn.Conv2d(4, 4, 3, padding=padding)), conv_of).padding == padding
    line = Lines(
        lambda m, x: F.conv2d(x, m.weight, padding=padding), weight=torch.randn(4, 4, 3, 3)
    )
    assert only(line, conv_of).padding == padding


def test_reflecting_padding_is_said():
    conv = only(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), conv_of)
    assert conv.padding_mode == "reflect"


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 6)),
        Lines(
            lambda m, x: F.linear(x, m.weight, m.bias),
            weight=torch.ones(6, 4), bias=torch.ones(6),
        ),
        Lines(
            lambda m, x: aten.linear.default(x, m.weight, m.bias),
            weight=torch.ones(6, 4), bias=torch.ones(6),
        ),
    ],
    ids=["module", "F", "aten"],
)  # fmt: skip
def test_a_linear_layer_in_every_spelling(model: nn.Module):
    linear = only(model, linear_of)
    assert (linear.weight.attr, linear.bias.attr) == ("weight", "bias")


def test_a_linear_layer_without_bias_has_none():
    assert only(nn.Sequential(nn.Linear(4, 6, bias=False)), linear_of).bias is None


def test_a_parametrized_layer_is_still_that_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    assert only(model, conv_of).module == "0"


ACTIVATIONS = {
    "module": (lambda: nn.Sequential(nn.ReLU()), "relu"),
    "subclass": (lambda: nn.Sequential(type("Mine", (nn.ReLU,), {})()), "relu"),
    "F": (lambda: Lines(lambda m, x: F.relu(x)), "relu"),
    "F in place": (lambda: Lines(lambda m, x: F.relu_(x)), "relu"),
    "torch": (lambda: Lines(lambda m, x: torch.relu(x)), "relu"),
    "method": (lambda: Lines(lambda m, x: x.relu()), "relu"),
    "method in place": (lambda: Lines(lambda m, x: x.sigmoid_()), "sigmoid"),
    "aten": (lambda: Lines(lambda m, x: aten.relu.default(x)), "relu"),
    "aten in place": (lambda: Lines(lambda m, x: aten.relu_.default(x)), "relu"),
    "silu": (lambda: nn.Sequential(nn.SiLU(inplace=True)), "silu"),
    "F.gelu": (lambda: Lines(lambda m, x: F.gelu(x, approximate="tanh")), "gelu"),
    "hardswish": (lambda: nn.Sequential(nn.Hardswish()), "hardswish"),
    "prelu": (lambda: nn.Sequential(nn.PReLU()), "prelu"),
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_an_activation_in_every_spelling(spelling: str):
    make, name = ACTIVATIONS[spelling]
    assert only(make(), activation_of).name == name


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.LeakyReLU(0.3)),
        Lines(lambda m, x: F.leaky_relu(x, 0.3)),
        Lines(lambda m, x: F.leaky_relu(x, negative_slope=0.3, inplace=True)),
        Lines(lambda m, x: aten.leaky_relu.default(x, 0.3)),
    ],
    ids=["module", "F", "F, keywords", "aten"],
)
def test_a_leaky_relu_has_its_slope(model: nn.Module):
    assert only(model, activation_of).negative_slope == 0.3


def test_what_is_none_of_these_is_none():
    model = nn.Sequential(nn.MaxPool2d(2), nn.Dropout(), nn.Identity(), nn.Flatten())
    captured = capture(model)
    for reader in (norm_of, conv_of, linear_of, activation_of):
        assert found(captured, reader) == []


class Squashes(nn.BatchNorm2d):
    """A BatchNorm by class that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_a_subclass_that_computes_something_else_is_not_its_base():
    captured = capture(nn.Sequential(Squashes(4)))
    assert found(captured, norm_of) == []
    assert [a.name for a in found(captured, activation_of)] == ["tanh"]


@pytest.mark.filterwarnings("ignore")
def test_fused_and_quantized_layers_are_not_their_float_bases():
    fused = torch.ao.nn.intrinsic.qat.ConvBn2d(
        4, 4, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    )
    captured = capture(nn.Sequential(fused, torch.ao.nn.quantized.Conv2d(4, 4, 1)))
    assert found(captured, conv_of) == []
    # The norm inside the fused layer is a norm, but its layer calls it, not code that was traced.
    (norm,) = found(captured, norm_of)
    assert norm.target == "0.bn"
    assert not captured.callers_known("0.bn")


def test_function_names_are_plain():
    graph = fx.symbolic_trace(Lines(lambda m, x: aten.relu_.default(F.relu_(x).add_(1))))
    names = [function_name(node) for node in graph.graph.nodes]
    assert names == [None, "relu", "add", "relu", None]
