"""A model in traced regions: each module that holds parameters is seen in exactly one place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rewrite.runtime.inputs import Inputs
from rewrite.runtime.tree import Tree
from rewrite.tracing.regions import (
    forward_branches,
    forward_defaults,
    is_lazy_model,
    trace_regions,
)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))


class ByValue(nn.Module):
    """Stops the tracer; holds a list, and a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Plain(), Plain()])
        self.head = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for part in self.parts:
            x = part(x) if x.sum() > 0 else x
        return x


def names(model: nn.Module, inputs: Tensor | None = None) -> tuple[list[str], dict[str, str]]:
    given = None if inputs is None else Inputs.of(inputs)
    traced = trace_regions(Tree(model), given)
    regions, opaque = traced.regions, traced.opaque
    return [region.name for region in regions], {k: o.reason for k, o in opaque.items()}


def test_a_model_that_can_be_traced_is_one_region() -> None:
    traced = trace_regions(Tree(nn.Sequential(Plain(), Plain())))
    regions, opaque, error = traced.regions, traced.opaque, traced.error
    (region,) = regions
    assert region.name == "" and opaque == {} and error is None
    called = [n.target for n in region.graph.nodes if n.op == "call_module"]
    assert called == ["0.fc", "0.bn", "1.fc", "1.bn"]
    assert region.entered == {"", "0", "1"}
    assert {region.frames[n].owner for n in region.graph.nodes} == {"", "0", "1"}


def test_below_an_opaque_module_each_part_is_a_region_of_its_own() -> None:
    found, opaque = names(nn.Sequential(ByValue(), nn.ReLU()))
    assert found == ["", "0.parts.0", "0.parts.1", "0.head"] and list(opaque) == ["0"]
    assert opaque["0"].startswith("TraceError")


def test_a_root_that_cannot_be_traced_leaves_regions_of_its_parts() -> None:
    found, opaque = names(ByValue())
    assert found == ["parts.0", "parts.1", "head"] and list(opaque) == [""]


@pytest.mark.parametrize("model", [nn.Sequential(ByValue(), Plain()), ByValue(), Plain()])
def test_every_module_with_parameters_is_called_in_exactly_one_place(model: nn.Module) -> None:
    regions = trace_regions(Tree(model)).regions
    called = [n.target for r in regions for n in r.graph.nodes if n.op == "call_module"]
    layers = [name for name, m in model.named_modules() if m._parameters]
    assert sorted(name for name in called if name in layers) == sorted(layers)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = ByValue()
    state, held = copy.deepcopy(model.state_dict()), dict(vars(model))
    trace_regions(Tree(model), Inputs.of(torch.randn(2, 4)))
    assert model.calls == 0 and dict(vars(model)) == held
    assert all(torch.equal(a, state[k]) for k, a in model.state_dict().items())


def test_a_hooked_module_is_a_boundary_whose_forward_is_traced_all_the_same() -> None:
    model = nn.Sequential(Plain(), nn.ReLU())
    model[0].register_forward_hook(lambda *args: None)
    found, opaque = names(model)
    assert found == ["", "0"] and opaque["0"].endswith("hook")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_and_a_forward_set_on_the_instance_are_opaque_by_name() -> None:
    model = nn.Sequential(Plain(), Plain())
    model[1].forward = lambda x: x
    found, opaque = names(model)
    assert "1" in opaque and {"1.fc", "1.bn"} <= set(found)
    assert names(torch.jit.trace(Plain().eval(), torch.randn(2, 4)))[1] == {
        "": "is a TorchScript module"
    }


def test_layers_below_an_opaque_module_know_their_shapes_from_the_run() -> None:
    traced = trace_regions(Tree(nn.Sequential(Wide())), Inputs.of(torch.randn(2, 4)))
    regions, error = traced.regions, traced.error
    part = next(region for region in regions if region.name == "0.part")
    values = {n.name: n.meta["val"].shape for n in part.graph.nodes if "val" in n.meta}
    assert error is None and (2, 6) in values.values(), values


class Wide(nn.Module):
    """Cannot be traced, and can be run without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError("no proxies")
        return self.part(x)


def test_a_lazy_model_is_told_and_traced_without_shapes() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert is_lazy_model(Tree(lazy)) and not is_lazy_model(Tree(Plain()))
    traced = trace_regions(Tree(lazy), Inputs.of(torch.randn(2, 4)))
    regions, error = traced.regions, traced.error
    assert error is None and all("val" not in n.meta for r in regions for n in r.graph.nodes)


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return x * scale if mask is None else x * mask


class AllOptional(nn.Module):
    def forward(self, pixel_values: Tensor | None = None, top: int = 1) -> Tensor:
        assert pixel_values is not None
        return pixel_values + top


def test_defaults_are_taken_but_for_a_first_argument_without_which_there_is_none() -> None:
    assert forward_defaults(Optional()) == {"mask": None, "scale": 2.0}
    assert forward_defaults(AllOptional()) == {"top": 1}


def test_only_tested_arguments_are_branches() -> None:
    assert forward_branches(Optional(), {"mask": None, "scale": 2.0}) == ("mask",)
    assert forward_branches(Optional(), {}) == ()
    attention = nn.MultiheadAttention(4, 2)
    assert forward_branches(attention, forward_defaults(attention)) == ()


def test_without_source_every_assumed_argument_may_be_tested() -> None:
    made: dict[str, object] = {}
    exec("def forward(self, x, a=None, b=None): return x", made)
    kind = type("Made", (nn.Module,), {"forward": made["forward"]})
    assert forward_branches(kind(), {"a": None, "b": None}) == ("a", "b")
