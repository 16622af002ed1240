"""What capture sees of each model that breaks symbolic tracing, and what it says about the rest."""

from __future__ import annotations

import inspect
import linecache
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import models
from passes import BatchNormToGroupNorm, FoldNorm
from rewrite.errors import CaptureError
from rewrite.graph.capture import capture, in_other_mode
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.operators import norm_of
from rewrite.protocol import apply_pass
from rewrite.provenance import shown_path
from rewrite.runtime.copying import copy_model


def norms(captured: Captured) -> list[str]:
    return [norm.target for node in captured.nodes() if (norm := norm_of(captured, node))]


def calls(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.nodes() if node.op == "call_module"]


class Opaque(nn.Module):
    """A forward that no tracer follows, around whatever it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        for child in self.children():
            x = child(x)
        return x


def conv_norm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))


class Caches(nn.Module):
    """Keeps a value of its input on itself, as torchvision's MultiScaleRoIAlign does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kept = nn.Conv2d(4, 4, 1), None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = x.mean()
        return self.conv(x) * self.kept


# -- what cannot be traced --------------------------------------------------------------------


class FailsLate(Opaque):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.sum() > 0 else x


def test_a_value_that_a_failed_trace_cached_is_in_no_other_graph():
    model = FailsLate(inner=Caches())
    captured = capture(model)
    region = next(r for r in captured.regions if r.name == "inner")
    nodes = set(region.graph.nodes)
    assert all(source in nodes for node in nodes for source in node.all_input_nodes)
    region.graph.lint()
    assert model.inner.kept is None


def test_a_model_that_can_be_traced_is_one_region_like_symbolic_trace():
    model, _ = models.build("residual")
    captured = capture(model)
    assert [region.name for region in captured.regions] == [""]
    assert not captured.opaque
    expected = symbolic_trace(model).graph
    assert [n.target for n in captured.nodes()] == [n.target for n in expected.nodes]


def test_control_flow_in_a_leaf_makes_that_leaf_alone_opaque():
    captured = capture(models.build("branching_leaf")[0])
    assert list(captured.opaque) == ["gate"]
    assert norms(captured) == ["bn", "out.1"]
    assert calls(captured) == ["conv", "bn", "gate", "out.0", "out.1"]


def test_control_flow_in_a_parent_leaves_its_children_to_regions_of_their_own():
    captured = capture(models.build("branching_parent")[0])
    assert list(captured.opaque) == ["block"]
    assert calls(captured)[:4] == ["stem.0", "stem.1", "block", "head"]
    assert sorted(norms(captured)) == ["block.bn1", "block.branch.1", "stem.1"]
    assert {region.name for region in captured.regions} == {
        "", "block.conv1", "block.bn1", "block.branch",
    }  # fmt: skip


def test_control_flow_in_the_root_leaves_every_child_a_region():
    captured = capture(models.build("branching_root")[0])
    assert list(captured.opaque) == [""]
    assert {region.name for region in captured.regions} == {"stem", "high", "low"}
    assert sorted(norms(captured)) == ["high.1", "low.1", "stem.1"]


def test_the_nodes_of_a_failed_attempt_are_erased():
    captured = capture(models.build("branching_leaf")[0])
    graph = captured.regions[0].graph
    graph.lint()
    assert all(node.users or node.op == "output" for node in graph.nodes)
    assert not any(node.target == "sum" for node in graph.nodes)


def test_a_proxy_that_is_iterated_is_a_reason_with_a_source_line():
    model = models.build("iterated_proxy")[0]
    captured = capture(model)
    assert captured.opaque[""].reason == "TraceError: Proxy object cannot be iterated"
    file, line = captured.opaque[""].source.rsplit(":", 1)
    assert file == shown_path(inspect.getfile(type(model)))
    assert "for frame in video" in linecache.getline(file, int(line))
    assert sorted(norms(captured)) == ["bn", "frame.1"]


def test_star_arguments_are_followed_or_opaque_and_no_norm_is_lost():
    assert norms(capture(models.build("star_arguments")[0])) == ["bn"]


class Forwarding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_norm()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


def test_a_forward_that_only_passes_its_star_arguments_on():
    captured = capture(nn.Sequential(Forwarding(), nn.ReLU()))
    assert calls(captured) == ["0.inner.0", "0.inner.1", "1"]
    assert not captured.opaque


def test_modules_in_plain_lists_and_dicts_have_names():
    captured = capture(models.build("plain_containers")[0])
    assert norms(captured) == ["layers[0]", "heads['norm']"]
    assert captured.module("heads['norm']") is captured.model.heads["norm"]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_opaque_inside_opaque_yields_each_child_once_at_any_depth(depth: int):
    model: nn.Module = Opaque(body=conv_norm())
    for _ in range(depth):
        model = Opaque(before=conv_norm(), inner=model)
    captured = capture(model)
    assert len(captured.opaque) == depth + 1
    assert len(calls(captured)) == len(set(calls(captured))) == 2 * (depth + 1)
    names = [region.name for region in captured.regions]
    assert len(names) == len(set(names))


def test_a_module_that_three_opaque_parents_hold_is_one_region():
    shared = conv_norm()
    model = nn.Sequential(Opaque(a=shared), Opaque(b=shared), Opaque(c=shared))
    captured = capture(model)
    assert norms(captured) == ["0.a.1"]
    assert captured.aliases("0.a") == ("1.b", "2.c")


def test_recursion_to_the_same_module_is_unrolled():
    captured = capture(models.build("recursion")[0])
    assert calls(captured) == ["conv", "bn", "conv", "bn"]
    assert not captured.opaque


class EndlessRecursion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return x if x.abs().max() < 1 else self(x / 2)


def test_recursion_on_values_is_opaque_and_its_children_are_seen():
    captured = capture(nn.Sequential(EndlessRecursion(), nn.ReLU()))
    assert list(captured.opaque) == ["0"]
    assert norms(captured) == ["0.bn"]


def test_a_submodule_that_is_never_called_is_a_region_with_unknown_callers():
    captured = capture(models.build("never_called")[0])
    assert norms(captured) == ["body.bn", "pretext.bn"]
    assert captured.callers_known("body.bn")
    assert not captured.callers_known("pretext")


def test_every_reference_model_is_captured_as_it_stands():
    for name in models.all_models():
        model, inputs = models.build(name)
        before = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
        attributes = {key: frozenset(vars(module)) for key, module in model.named_modules()}
        captured = capture(model, inputs)
        for region in captured.regions:
            region.graph.lint()
        assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == before, name
        assert {k: frozenset(vars(m)) for k, m in model.named_modules()} == attributes, name


# -- who calls, who reads ---------------------------------------------------------------------


def test_one_caller_is_not_one_known_caller():
    model = nn.Sequential(conv_norm(), Opaque(body=conv_norm()))
    captured = capture(model)
    assert len(captured.calls("0.1")) == len(captured.calls("1.body.1")) == 1
    assert captured.callers_known("0.1")
    assert not captured.callers_known("1.body")
    assert "1.body is not called in any traced forward" in captured.unknown_caller("1.body")


def named_conv_norm() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))


class ReachesIn(nn.Module):
    """Opaque, and calls a grandchild by its path beside the child that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = named_conv_norm()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        return self.block(x) + self.block.conv(x)


def test_an_opaque_parent_that_reaches_into_a_child_makes_the_grandchild_unknown():
    captured = capture(ReachesIn())
    assert not captured.callers_known("block.conv")
    assert captured.callers_known("block.bn")


def test_a_block_called_whole_and_in_parts_shows_both_calls():
    captured = capture(models.build("block_called_in_parts")[0])
    assert len(captured.calls("block.conv")) == 2
    assert len(captured.calls("block.bn")) == 1
    assert {captured.owner(node) for node in captured.calls("block.conv")} == {"", "block"}


def test_calls_under_every_alias_are_calls_of_one_module():
    captured = capture(models.build("norm_under_two_names")[0])
    assert len(captured.calls("norm1")) == len(captured.calls("norm2")) == 2
    assert captured.aliases("norm1") == ("norm2",)


def test_calls_are_counted_over_all_regions():
    shared = nn.BatchNorm2d(4)
    captured = capture(nn.Sequential(shared, Opaque(a=nn.Sequential(shared, nn.ReLU()))))
    assert len(captured.calls("0")) == 2
    assert len({captured.region_of(node) for node in captured.calls("0")}) == 2


def test_readers_of_a_value_inside_the_graph_are_known():
    captured = capture(models.build("two_norms_one_conv")[0])
    readers = captured.readers(captured.calls("conv")[0])
    assert readers.known
    assert [str(node.target) for node in readers.nodes] == ["bn1", "bn2"]


def test_readers_of_a_value_that_is_returned_are_not_all_known():
    captured = capture(models.build("escaping_conv")[0])
    readers = captured.readers(captured.calls("conv")[0])
    assert not readers.known
    assert "returned" in readers.reason


def test_readers_of_a_hooked_module_are_not_all_known():
    captured = capture(models.build("hook_on_conv")[0])
    readers = captured.readers(captured.calls("conv")[0])
    assert not readers.known
    assert "hook" in readers.reason


class TwoWays(nn.Module):
    """The branch that is not traced reads the convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        x = self.conv(x)
        if raw:
            return x
        return self.bn(x)


def test_a_default_that_the_forward_branches_on_leaves_readers_unknown():
    captured = capture(TwoWays())
    assert captured.regions[0].branches == ("raw",)
    assert not captured.readers(captured.calls("conv")[0]).known


# -- provenance -------------------------------------------------------------------------------


def test_every_call_knows_its_innermost_owner_and_its_line():
    model = models.build("functional_norm_deep")[0]
    captured = capture(model)
    found = [n for n in captured.nodes() if n.target is F.batch_norm]
    assert [captured.owner(node) for node in found] == ["blocks.0", "blocks.2"]
    for node in found:
        assert captured.source(node).startswith(shown_path(inspect.getfile(type(model.blocks[0]))))
        assert "F.batch_norm" in captured.source_text(node)


def test_two_invocations_of_one_forward_are_two_frames():
    captured = capture(models.build("recursion")[0])
    first, second = captured.calls("conv")
    assert captured.owner(first) == captured.owner(second) == ""
    assert captured.call_sites(first) == (first, second)
    assert captured.source(first) == captured.source(second)


def test_tied_parameters_name_each_other():
    captured = capture(models.build("tied_convs")[0])
    assert captured.tied(TensorRef("conv1", "weight")) == (TensorRef("conv2", "weight"),)
    assert captured.tied(TensorRef("bn1", "weight")) == ()


def test_a_view_of_a_parameter_counts_as_tied():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:4])
    assert capture(model).tied(TensorRef("0", "weight")) == (TensorRef("1", "weight"),)


def test_hooks_and_parametrizations_are_reasons():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4))
    parametrizations.weight_norm(model[0])
    model[1].register_forward_hook(lambda *_: None)
    captured = capture(model)
    assert captured.hooks("0") == ("has a parametrization of weight",)
    assert captured.hooks("1") == ("has a forward hook",)
    assert captured.hooks("2") == ()


# -- shapes -----------------------------------------------------------------------------------


def test_example_inputs_attach_shapes_in_every_region_without_computing():
    model, inputs = models.build("iterated_proxy")
    real = []
    model.frame[0].register_forward_pre_hook(lambda _, args: real.append(not args[0].is_meta))
    captured = capture(model, inputs)
    assert real and not any(real)
    assert captured.shape(captured.calls("frame.1")[0]) == model.frame(inputs[0][0]).shape
    assert captured.shape(captured.calls("bn")[0]) == model(*inputs).shape


def test_without_example_inputs_there_is_no_shape():
    captured = capture(models.build("residual")[0])
    assert all(captured.shape(node) is None for node in captured.nodes())


def test_a_forward_that_reads_values_still_has_shapes_up_to_there():
    model, inputs = models.build("branching_leaf")
    captured = capture(model, inputs)
    assert captured.shape(captured.calls("bn")[0]) == model.bn(model.conv(*inputs)).shape
    assert captured.shape(captured.calls("out.1")[0]) is None
    assert captured.shape_error


# -- unusual submodules -----------------------------------------------------------------------


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


UNUSUAL = {
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()),
    "meta": lambda: plain().to("meta"),
    "half": lambda: plain().half(),
    "bfloat16": lambda: plain().bfloat16(),
    "channels_last": lambda: plain().to(memory_format=torch.channels_last),
    "frozen": lambda: plain().requires_grad_(False),
    "shared_memory": lambda: plain().share_memory(),
    "data_parallel": lambda: nn.DataParallel(plain()),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_submodules_are_captured(kind: str):
    model = UNUSUAL[kind]()
    captured = capture(model)
    assert captured.regions
    assert (kind == "lazy") == (not norms(captured))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_submodule_is_one_opaque_call():
    captured = capture(nn.Sequential(torch.jit.script(plain()), nn.BatchNorm2d(8)).eval())
    assert "1" in norms(captured)
    assert "0" in calls(captured)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_captured_and_its_norms_are_not_float_norms():
    class Quantizable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = torch.ao.quantization.QuantStub(), nn.Identity()
            self.conv, self.bn = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.quant(x))).dequantize()

    model = Quantizable().eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    torch.ao.quantization.prepare(model, inplace=True)
    model(torch.randn(2, 4, 3, 3))
    torch.ao.quantization.convert(model, inplace=True)
    assert "quantized" in type(model.bn).__module__
    captured = capture(model, (torch.randn(2, 4, 3, 3),))
    assert "bn" in calls(captured)
    assert norms(captured) == []


def test_a_graph_module_is_a_model_like_any_other():
    model = models.build("graph_module_root")[0]
    captured = capture(model)
    assert captured.owner(captured.calls("bn1")[0]) == ""
    assert norms(captured) == ["bn1", "bn2"]


def test_exported_programs_are_read_as_aten_with_named_parameters():
    model, inputs = models.build("residual")
    program = torch.export.export(model.eval(), inputs)
    captured = capture(program.module())
    found = [norm for node in captured.nodes() if (norm := norm_of(captured, node))]
    assert [norm.running_mean.name for norm in found] == ["bn1.running_mean", "bn2.running_mean"]


class EveryArgumentOptional(nn.Module):
    """As in transformers: the input has a default too, and its absence is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, pixel_values: Tensor | None = None, scale: float = 2.0) -> Tensor:
        if pixel_values is None:
            raise ValueError("pixel_values is missing")
        return self.conv(pixel_values) * scale


def test_the_first_argument_is_an_input_when_every_argument_has_a_default():
    captured = capture(EveryArgumentOptional())
    assert not captured.opaque
    assert captured.regions[0].assumed == {"scale": 2.0}
    assert captured.callers_known("conv")


class IteratesItsSequential(nn.Module):
    """A Sequential as a mere list: its own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
        self.unused = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.empty = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.convs)


def test_a_sequential_that_is_only_iterated_over_is_no_second_call_of_its_items():
    captured = capture(IteratesItsSequential())
    assert [region.name for region in captured.regions] == ["", "unused"]
    assert len(captured.calls("convs.0")) == 1
    assert captured.callers_known("convs.0")
    assert not captured.callers_known("unused")


@pytest.mark.parametrize("name", ["residual", "norm_with_activation", "grouped_transpose"])
def test_exported_programs_are_rewritten_like_the_eager_model(name: str):
    model, inputs = models.build(name)
    program = torch.export.export(model.eval(), inputs).module()
    for rewrite in (FoldNorm(), BatchNormToGroupNorm()):
        eager = apply_pass(rewrite, copy_model(model), inputs)
        exported = apply_pass(rewrite, copy_model(program), inputs)
        assert len(exported.changes) == len(eager.changes) > 0
        assert type(exported.model).__name__ == "GraphModule"
        torch.testing.assert_close(
            exported.model(*inputs), eager.model(*inputs), rtol=1e-12, atol=1e-12
        )
        again = torch.export.export(exported.model, inputs).module()
        torch.testing.assert_close(again(*inputs), exported.model(*inputs), rtol=0, atol=0)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"a str is no torch\.nn\.Module"):
        capture("resnet18")  # type: ignore[arg-type]  # the mistake that is tested


class ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y) + y if self.training else self.b(y)


def test_the_other_mode_is_read_where_it_runs_other_lines_and_is_none_where_it_does_not() -> None:
    x = torch.randn(2, 3)
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).eval()
    assert in_other_mode(capture(plain, x)) is None
    model = ReadsTwice().eval()
    captured = capture(model, x)
    other = in_other_mode(captured)
    assert other is not None and not model.training
    (eval_call,), (train_call,) = captured.calls("a"), other.calls("a")
    assert len(captured.readers(eval_call).nodes) == 1
    assert len(other.readers(train_call).nodes) == 2
