"""The eight differences from torch.fx's tracer that the module lists, one test each, and more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rewrite.runtime.tree import Tree
from rewrite.tracing.regions import Region, trace_regions
from rewrite.tracing.tracer import has_parametrizations, hook_reasons, is_leaf


def trace(model: nn.Module) -> tuple[Region, dict[str, Any]]:
    traced = trace_regions(Tree(model))
    regions, opaque = traced.regions, traced.opaque
    return regions[0], opaque


def targets(region: Region, op: str = "call_module") -> list[Any]:
    return [node.target for node in region.graph.nodes if node.op == op]


class Inherits(nn.Linear):
    """Adds nothing to the forward."""


class Overrides(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


def with_own_forward() -> nn.Module:
    layer = Inherits(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]  # what some libraries do
    return layer


@pytest.mark.parametrize(
    ("module", "leaf"),
    [
        (nn.Linear(4, 4), True),
        (Inherits(4, 4), True),
        (parametrizations.weight_norm(nn.Linear(4, 4)), True),
        (nn.MultiheadAttention(4, 2), True),
        (Overrides(4, 4), False),
        (ConvForward(3, 4, 1), False),
        (with_own_forward(), False),
        (parametrizations.weight_norm(Overrides(4, 4)), False),
        (nn.Sequential(nn.Linear(4, 4)), False),
        (nn.TransformerEncoderLayer(4, 2), False),
    ],
)
def test_a_standard_layer_is_a_leaf_by_its_forward(module: nn.Module, leaf: bool) -> None:
    assert is_leaf(module) is leaf


def test_a_subclass_with_a_forward_of_its_own_is_entered() -> None:
    region, opaque = trace(nn.Sequential(Overrides(4, 4)))
    assert not opaque and targets(region) == []
    assert targets(region, "get_attr") == ["0.weight", "0.bias"]


class Fails(nn.Module):
    """Records two calls, then stops the tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.fc(x))
        return x if x.sum() > 0 else self.kept


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fails, self.after = Fails(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fails(x))


def test_a_submodule_whose_forward_raises_is_one_call_and_tracing_goes_on() -> None:
    region, opaque = trace(Around())
    assert targets(region) == ["fails", "after"] and set(opaque) == {"fails"}
    assert targets(region, "call_function") == [], "the attempt is erased"
    assert opaque["fails"].source.rpartition(":")[0].endswith("test_tracer.py")
    assert region.entered == {""}


def test_targets_are_names_of_the_whole_model_whichever_root_is_traced() -> None:
    regions = trace_regions(Tree(Around())).regions
    below = next(region for region in regions if region.name == "fails.fc")
    assert targets(below) == ["fails.fc"]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_a_module_with_hooks_is_a_boundary(kind: str) -> None:
    model = nn.Sequential(Overrides(4, 4))
    if kind == "forward":
        model[0].register_forward_hook(lambda *args: None)
    elif kind == "pre":
        model[0].register_forward_pre_hook(lambda *args: None)
    else:
        model[0].register_full_backward_hook(lambda *args: None)
    region, opaque = trace(model)
    assert hook_reasons(model[0]) and targets(region) == ["0"]
    assert opaque["0"].reason == hook_reasons(model[0])[0]


def test_the_hooks_of_torchs_own_weight_norm_are_no_hooks_of_a_user() -> None:
    layer = nn.utils.spectral_norm(nn.Linear(4, 4))
    assert layer._forward_pre_hooks and hook_reasons(layer) == ()


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.count = nn.Linear(4, 4), 0
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(x)
        self.last = self.fc(x)
        return self.last + torch.rand(4)


def test_nothing_of_the_model_changes_nor_do_the_random_generators() -> None:
    model = Stateful()
    before = torch.random.get_rng_state()
    region, opaque = trace(model)
    assert not opaque and (model.count, model.log) == (0, []) and "last" not in vars(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(region.kept.values()) == {"last", "log"}


def test_a_constant_is_kept_beside_the_graph() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.full((4,), 2.0)

    model = Adds()
    region, _ = trace(model)
    (name,) = region.constants
    assert torch.equal(region.constants[name], torch.full((4,), 2.0)) and region.made == {name}
    assert not vars(model)["_buffers"] and not hasattr(model, name)


def test_a_tensor_that_an_attribute_holds_is_a_constant_that_is_not_made_anew() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = torch.full((4,), 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.held

    region, _ = trace(Holds())
    assert len(region.constants) == 1 and region.made == frozenset()


def test_a_slice_of_a_sequential_is_entered() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[:-1](x)

    region, opaque = trace(Slices())
    assert not opaque and targets(region) == ["layers.0", "layers.1"]


def test_a_module_that_no_attribute_holds_is_named_as_the_reason() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.ReLU()(x)

    traced = trace_regions(Tree(Makes()))
    regions, opaque = traced.regions, traced.opaque
    assert regions == ()
    assert opaque[""].reason == "NameError: calls a ReLU that no attribute of the model holds"


def test_each_call_has_its_frame_its_line_and_whether_it_was_augmented() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return x + 2

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Adds()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.part(x))

    region, _ = trace(Twice())
    nodes = [node for node in region.graph.nodes if node.op == "call_function"]
    assert [(region.frames[n].owner, region.frames[n].invocation) for n in nodes] == [
        ("part", 0), ("part", 0), ("part", 1), ("part", 1)
    ]  # fmt: skip
    assert [node in region.augmented for node in nodes] == [True, False, True, False]
    first = Adds.forward.__code__.co_firstlineno
    assert [region.lines[n][1] - first for n in nodes] == [1, 2, 1, 2]


def test_a_parametrized_module_is_told_from_a_plain_one() -> None:
    assert has_parametrizations(parametrizations.weight_norm(nn.Linear(4, 4)))
    assert not has_parametrizations(nn.Linear(4, 4))
