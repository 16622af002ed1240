"""What the code of a class does with its modules beside calling them, read from its source."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _functional_call as functional_call

from rewrite.tracing.code.class_code import ClassCode, ModuleUse, code_of


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.domain, self.cache = "a", torch.zeros(())
        self.register_buffer("count", torch.zeros(()))
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4)})


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AsksClasses(Base):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.bn, nn.BatchNorm2d | nn.GroupNorm):
            return x
        if isinstance(self.conv, (nn.Conv1d, nn.Conv2d)):
            return x
        return self.bn(x) if type(self.bn) is nn.BatchNorm2d else x


class Reads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) * self.bn.num_features


class ReadsAll(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + sum(p.pow(2).sum() for p in self.conv.parameters())


class AsksKind(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.conv.parameters()).dtype)
        return self.bn(x) if all(p.is_floating_point() for p in self.bn.parameters()) else x


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.conv, {}, (x,))  # type: ignore[no-any-return]  # private torch


class Chooses(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.domain](x) if self.domain else self.bn(x)


class ByTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if self.training else x


class Assigns(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.cache = x
        self.count.add_(1)
        return x


class Enters(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x


class Watches(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("name"):
            return self.bn(x)


def paths(uses: list[ModuleUse]) -> set[Any]:
    return {use.path for use in uses}


def test_a_class_that_only_calls_its_layers_does_nothing_else() -> None:
    code = code_of(Plain)
    assert code.calls == [("bn",), ("conv",)]
    for kind in ("tests", "tensors", "choices", "assigned", "contexts", "stores"):
        assert getattr(code, kind) == [], kind


def test_a_test_of_a_class_names_the_module_and_the_classes() -> None:
    tests = code_of(AsksClasses).tests
    assert paths(tests) == {("bn",), ("conv",)}
    by_text = {use.text: use for use in tests}
    several = by_text["isinstance(self.conv, (nn.Conv1d, nn.Conv2d))"]
    assert several.kinds == (nn.Conv1d, nn.Conv2d)
    assert several.place.startswith("test_class_code.py:")
    assert by_text["type(self.bn)"].kinds == (nn.BatchNorm2d,)


def test_a_read_of_an_attribute_names_it_at_its_line() -> None:
    (read,) = [use for use in code_of(Reads).reads if use.path == ("bn", "num_features")]
    line = Reads.forward.__code__.co_firstlineno + 1
    assert read.text == "self.bn.num_features" and read.place == f"test_class_code.py:{line}"


def test_reading_all_parameters_is_told_from_asking_their_dtype() -> None:
    assert paths(code_of(ReadsAll).tensors) == {("conv",)}
    assert code_of(AsksKind).tensors == []
    assert paths(code_of(Calls).tensors) == {("conv",)}


def test_a_choice_by_an_attribute_names_all_that_it_may_choose() -> None:
    choices = code_of(Chooses).choices
    assert {("norms", None), ("bn",)} <= paths(choices)
    assert "if self.domain" in {use.text for use in choices}
    assert code_of(ByTraining).choices == [], "a mode is no attribute that somebody sets"


def test_assignments_and_in_place_methods_are_noted() -> None:
    code = code_of(Assigns)
    assert paths(code.stores) == {("cache",)}
    assert paths(code.assigned) == {("cache",), ("count",)}


def test_a_context_that_changes_something_is_told_from_one_that_watches() -> None:
    assert [use.text for use in code_of(Enters).contexts] == ["torch.no_grad()"]
    assert code_of(Watches).contexts == []


# -- which functions are read ---------------------------------------------------------------------


def norm_size(module: nn.Module) -> int:
    return module.bn.num_features  # type: ignore[union-attr,return-value]  # read, never run


def plain_size(size: int) -> int:
    return size


class ThroughHelpers(Base):
    @property
    def features(self) -> int:
        return self.bn.num_features

    def step(self, x: Tensor) -> Tensor:
        return x * self.features

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x) + norm_size(self) + plain_size(3)


class ThroughProperty(Base):
    @property
    def features(self) -> int:
        return self.bn.num_features

    def forward(self, x: Tensor) -> Tensor:
        return x * self.features


class Overrides(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class Extends(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


class Decorated(Base):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return x * self.bn.num_features


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        (ThroughHelpers, True),
        (ThroughProperty, True),
        (Overrides, False),
        (Extends, True),
        (Decorated, True),
    ],
)
def test_what_forward_reaches_is_read_and_what_it_overrides_is_not(
    kind: type[nn.Module], reads: bool
) -> None:
    assert (("bn", "num_features") in paths(code_of(kind).reads)) is reads


class Moves(Base):
    """Methods whose names tensors and packages have, too."""

    def to(self, *given: Any, **named: Any) -> Any:
        return self.cuda()

    def cuda(self, *given: Any, **named: Any) -> Any:
        return super().cuda() if isinstance(self.bn, nn.BatchNorm2d) else self


class MovesValues(Moves):
    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32) if torch.cuda.is_available() else x[:, None].to(x.dtype)[:, 0]
        return self.bn(self.conv(y)) + self.count.to(x.dtype)


class MovesItself(Moves):
    def forward(self, x: Tensor) -> Tensor:
        own = self
        return self.bn(self.conv(own.to(x.device) and x))


class MovesByItsClass(Moves):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(Moves.cuda(self) and x))


def test_a_method_of_a_value_or_a_package_is_none_of_the_module() -> None:
    assert not code_of(MovesValues).tests
    for kind in (MovesItself, MovesByItsClass):
        assert [use.path for use in code_of(kind).tests] == [("bn",)]


class Others(Plain):
    def export(self) -> int:
        return self.bn.num_features

    def _private(self) -> int:
        return self.conv.in_channels


def test_public_methods_that_forward_does_not_reach_are_listed_by_what_they_spell() -> None:
    code = code_of(Others)
    assert set(code.others) == {"export"} and ("bn", "num_features") in code.others["export"]
    assert code.reads == code_of(Plain).reads


def test_the_class_of_torch_itself_is_not_read() -> None:
    assert code_of(nn.BatchNorm2d) == ClassCode()


def test_code_is_read_anew_when_a_method_is_exchanged() -> None:
    class Changing(Plain):
        pass

    before = code_of(Changing)
    assert code_of(Changing) is before
    Changing.forward = Assigns.forward  # type: ignore[method-assign]  # what a user may do
    assert paths(code_of(Changing).stores) == {("cache",)}


def test_a_function_whose_source_is_gone_is_read_as_empty() -> None:
    made: dict[str, Any] = {}
    exec(compile("def forward(self, x): return self.bn.eps", os.devnull, "exec"), made)
    kind = type("Made", (Base,), {"forward": made["forward"]})
    assert code_of(kind).reads == []


def test_a_word_of_a_configuration_is_no_call_of_a_method_that_loads_adapters() -> None:
    transformers = pytest.importorskip("transformers")
    code = code_of(transformers.Wav2Vec2ConformerModel)
    assert "add_adapter" in vars(transformers.modeling_utils.PeftAdapterMixin)
    assert not any("named_modules" in use.text for use in code.tests)
