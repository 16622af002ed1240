"""The shape of each value of a trace is that of a real run, and no number is needed for it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional as F

from rewrite.graph.capture import capture
from rewrite.runtime.inputs import Inputs
from rewrite.runtime.stand_in import stand_in, without_values
from rewrite.runtime.tree import Tree
from rewrite.tracing.regions import trace_regions
from rewrite.tracing.shapes import Shapes

X = torch.randn(2, 4, 6, 6)


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.scale)


class Seen(Interpreter):
    """Runs a graph and compares what each value is with what the trace said."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            told = n.meta["val"]
            assert (told.shape, told.dtype) == (value.shape, value.dtype), n
            assert told.is_meta
            self.compared = getattr(self, "compared", 0) + 1
        return value


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s: x + s,
        lambda x, s: operator.mul(s, x),
        lambda x, s: x + x[:, :1],
        lambda x, s: x[:1] + x[:, :1],
        lambda x, s: x + x.double(),
        lambda x, s: x.int() / 2,
        lambda x, s: torch.cat([x, x[:, :3].contiguous(), x], 1),
        lambda x, s: torch.cat((x, x), dim=-1),
        lambda x, s: torch.cat([x, x.mT], 0),
        lambda x, s: torch.cat([x, x.double()], 1),
        lambda x, s: torch.cat([x.flatten(), x.new_zeros(0)]),
        lambda x, s: torch.add(x, s, alpha=2),
        lambda x, s: F.gelu(x).flatten(1).unsqueeze(-1),
        lambda x, s: F.layer_norm(x, (6, 6)).mean((2, 3), keepdim=True),
        lambda x, s: x.permute(0, 2, 3, 1).mT @ x.permute(0, 2, 3, 1),
        lambda x, s: x.chunk(2, 1)[1].amax(dim=-1),
        lambda x, s: torch.cat([x, x], dim=1).to(torch.float64),
        lambda x, s: x.new_zeros(x.shape[0], 3) + x.sum(),
    ],
)
def test_each_value_has_the_shape_and_dtype_of_a_real_run(function: Callable[..., Any]) -> None:
    model = Calls(function)
    traced = trace_regions(Tree(model), Inputs.of(X))
    (region,), opaque, error = traced.regions, traced.opaque, traced.error
    assert not opaque and error is None
    run = Seen(torch.fx.GraphModule(model, region.graph))
    run.run(X)
    assert run.compared >= 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveAvgPool2d((2, None)),
        nn.AvgPool2d(2), nn.Conv2d(4, 7, 3, stride=2), nn.Conv2d(4, 8, (3, 2), (1, 2), 1, 2, 4),
        nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.Conv2d(4, 6, 6),
        nn.Conv2d(4, 7, 3, padding=2, padding_mode="reflect"), nn.Identity(), nn.Hardswish(),
        nn.Flatten(),
        nn.ConvTranspose2d(4, 2, 2, 2), nn.Upsample(scale_factor=2),
    ],
)  # fmt: skip
def test_each_layer_has_the_shape_of_a_real_run(layer: nn.Module) -> None:
    captured = capture(nn.Sequential(layer).eval(), example_inputs=X)
    (node,) = captured.calls("0")
    assert captured.shape_error is None and captured.shape(node) == layer.eval()(X).shape


def changes_shape(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output[:, :2]


def test_a_hook_on_a_layer_that_keeps_its_shape_is_run() -> None:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(changes_shape)
    captured = capture(model, example_inputs=X)
    assert captured.shape(captured.calls("0")[0]) == (2, 2, 6, 6)


def halves_its_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0][:, :, ::2].contiguous()


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.AdaptiveAvgPool2d((None, 2)), nn.Conv2d(4, 4, 3, padding=1)]
)
def test_a_hook_before_a_layer_is_run(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(halves_its_input)
    captured = capture(nn.Sequential(layer).eval(), example_inputs=X)
    assert captured.shape(captured.calls("0")[0]) == layer(X).shape


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s: torch.cat([x, s], 1),
        lambda x, s: torch.cat([x, x[:1].contiguous()], 1),
        lambda x, s: torch.cat([x, x], 4),
        lambda x, s: torch.cat([], 0),
    ],
)
def test_tensors_that_do_not_join_have_no_shape(function: Callable[..., Any]) -> None:
    captured = capture(Calls(function), X)
    calls = [n for n in captured.nodes() if n.target is torch.cat]
    assert all(captured.shape(call) is None for call in calls)
    assert captured.shape_error or captured.opaque


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(5, 7, 3), nn.Conv2d(4, 7, 7), nn.Conv2d(4, 7, 3).double()]
)
def test_what_cannot_be_run_has_no_shape_and_says_why(layer: nn.Module) -> None:
    captured = capture(nn.Sequential(layer, nn.ReLU()), example_inputs=X)
    assert captured.shape_error is not None and captured.shape_error.startswith("_0: RuntimeError")
    assert captured.shape(captured.calls("0")[0]) is None
    assert captured.shape(captured.calls("1")[0]) is None


def test_a_value_that_no_input_changes_is_fixed_and_others_are_not() -> None:
    model = Calls(lambda x, s: x * (s + 1))
    (region,) = trace_regions(Tree(model), Inputs.of(X)).regions
    fixed = {n.name for n in region.graph.nodes if n.meta.get("fixed")}
    assert fixed == {"scale", "add"}


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.device.type == "cpu",
        lambda x: x.device == torch.device("cpu"),
        lambda x: not x.is_meta and x.is_cpu,
        lambda x: x.device.type != "cuda",
        lambda x: x.device != torch.device("cuda"),
    ],
)
def test_a_question_about_the_device_is_answered_for_the_model_and_not_for_meta(
    asks: Callable[[Any], bool],
) -> None:
    for wanted, function in ((True, asks), (False, lambda x: not asks(x))):
        model = Calls(lambda x, s, f=function: x.relu() if f(x) else x.tanh())
        traced = trace_regions(Tree(model), Inputs.of(X))
        (region,), opaque = traced.regions, traced.opaque
        called = {n.target for n in region.graph.nodes if n.op == "call_method"}
        assert not opaque and called == {"relu" if wanted else "tanh"}


class Optional(nn.Module):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, top: int = 1, flag: bool = False
    ) -> Any:
        return x


def test_optional_arguments_are_those_that_were_given() -> None:
    model = Optional()
    tree = Tree(model)
    copied = Tree(stand_in(tree, without_values, without_values))
    assumed = {"mask": None, "top": 1, "flag": False}
    for given, expected in (
        (Inputs((X,), {}), assumed),
        (Inputs((X,), {"top": 3, "flag": True}), {"mask": None, "top": 3, "flag": True}),
        (Inputs((X, X), {}), {"top": 1, "flag": False}),
        (Inputs((), {"unknown": X}), assumed),
    ):
        assert Shapes(tree, copied, given).given(model, assumed) == expected
