"""Functions that a module holds, and what they do with the modules that they are given."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import passes
import rewrite
from rewrite.tracing.code.class_code import code_of
from rewrite.tracing.code.handed import with_handed


def plain(module: "Base", x: Tensor) -> Tensor:
    return module.last(module.bn(module.first(x)).relu())


def reads_all(module: "Base", x: Tensor) -> Tensor:
    return plain(module, x) * sum(p.square().sum() for p in module.parameters())


class Policy:
    """What a model may hold to run itself."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        self.body = body

    def run(self, module: "Base", x: Tensor) -> Tensor:
        return self.body(module, x)

    def reading(self, module: "Base", x: Tensor) -> Tensor:
        return plain(module, x) * sum(p.square().sum() for p in module.parameters())


class Base(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.body = body


class InAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)  # type: ignore[no-any-return]  # whatever the test gives


class InName(Base):
    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        return body(x=x, module=self)  # type: ignore[no-any-return]  # whatever the test gives


class InList(Base):
    def forward(self, x: Tensor) -> Tensor:
        for body in self.body:
            x = body(self, x)[:, :3]
        return x


class InObject(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.body.reading(self, x)  # type: ignore[no-any-return]  # whatever the test gives


class OwnMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.normed(self.bn, self.first(x)))  # type: ignore[no-any-return]  # of torch

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) * (2 if type(norm) is nn.BatchNorm2d else 1)


READING = {
    "a function": lambda: InAttribute(reads_all),
    "by another name, as keywords": lambda: InName(reads_all),
    "one of several": lambda: InList([plain, reads_all]),
    "a partial": lambda: InAttribute(functools.partial(reads_all)),
    "a method of an object": lambda: InObject(Policy(plain)),
    "a bound method": lambda: InAttribute(Policy(plain).reading),
    "without source": lambda: InAttribute(eval("lambda m, x: m.last(m.first(x))")),
}


@pytest.mark.parametrize("name", READING)
def test_a_held_function_that_reads_every_tensor_stops_a_rescaling(name: str) -> None:
    torch.manual_seed(0)
    model = READING[name]().double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    code = code_of(type(model))
    assert not code.tensors and with_handed(model, code).tensors
    result = rewrite.convert(model, passes.Rebalance(objective="l2"), example_inputs=x)
    assert not result.report.passes[0].changes
    assert torch.equal(result.model(x), model(x))


@pytest.mark.parametrize("kind", [InAttribute, InName])
def test_a_held_function_that_only_calls_is_followed(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model = kind(plain).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = rewrite.convert(model, passes.Rebalance(objective="l2"), example_inputs=x)
    assert result.report.passes[0].changes
    assert torch.allclose(result.model(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_method_is_read_with_what_its_argument_is() -> None:
    result = rewrite.convert(OwnMethod(None).eval(), "bn-to-gn", verify=False)
    (skip,) = result.report.passes[0].skips
    assert not result.report.passes[0].changes and "type(norm)" in skip.reason


def test_no_property_of_the_model_runs() -> None:
    class Asks(Base):
        @property
        def chosen(self) -> Any:
            raise AssertionError("ran")

        def forward(self, x: Tensor) -> Tensor:
            return self.chosen(self, x)  # type: ignore[no-any-return]  # never called

    model = Asks(None)
    assert not with_handed(model, code_of(Asks)).tensors
