"""rewrite.tracing.code.functions_run: what functions do with the modules that they get."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite

X = torch.randn(2, 3, 6, 6, dtype=torch.float64)


class Plain(nn.Module):
    """conv, norm, ReLU; `forward` says how something else asks what the norm is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def asks_the_class(module: Plain, x: Tensor) -> Tensor:
    """Compute something else where the norm is a BatchNorm."""
    return module.body(x) * (2 if isinstance(module.bn, nn.BatchNorm2d) else 1)


def reads(module: Plain) -> Any:
    return module.bn.eps


def sees_nothing(module: Plain, x: Tensor) -> Tensor:
    return module.body(x) * 2


@functools.singledispatch
def generic(module: Any, x: Tensor) -> Tensor:
    raise TypeError


@generic.register
def _(module: Plain, x: Tensor) -> Tensor:
    return asks_the_class(module, x)


class Helper:
    def __call__(self, module: Plain, x: Tensor) -> Tensor:
        return asks_the_class(module, x)


def around(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(self: Plain, x: Tensor) -> Tensor:
        y = forward(self, x)
        return y * 2 if isinstance(self.bn, nn.BatchNorm2d) else y

    return wrapper


def around_named(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.wraps(forward)(around(forward))


class Width:
    def __get__(self, owner: Plain, kind: type) -> int:
        return owner.bn.num_features


class ByName(Plain):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(sys.modules[__name__], "asks_the_class")(self, x)  # noqa: B009 - the case
        return found


class FromGlobals(Plain):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = globals()["asks_the_class"](self, x)
        return found


class Imported(Plain):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = importlib.import_module(__name__).asks_the_class(self, x)
        return found


class Generic(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return generic(self, x)


class ByAnObject(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return Helper()(self, x)


class Partial(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return functools.partial(asks_the_class, self)(x)


class Bound(Plain):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = types.MethodType(asks_the_class, self)(x)
        return found


class Mapped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * sum(map(lambda norm: norm.num_features, [self.bn]))  # noqa: C417


class Evaluated(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * eval("self.bn.num_features")


class Wrapped(Plain):
    @around
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class WrappedByName(Plain):
    @around_named
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Described(Plain):
    width = Width()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.width


class Cached(Plain):
    @functools.cached_property
    def width(self) -> int:
        return self.bn.num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.width


class Delegates(Plain):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.bn, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.num_features


class Calls(Plain):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * self.bn.num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Unpacked(Plain):
    def forward(self, x: Tensor) -> Tensor:
        given = (self, x)
        return asks_the_class(*given)


class Parent(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return asks_the_class(self, x)


class OfItsParent(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return Parent.forward(self, x)


class Weak(Plain):
    def forward(self, x: Tensor) -> Tensor:
        norm = weakref.ref(self.bn)
        return self.body(x) * norm().eps  # type: ignore[union-attr]  # it is alive


class Fuses(Plain):
    def forward(self, x: Tensor) -> Tensor:
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.bn)
        return torch.relu(cast(Tensor, fused(x)))


READERS = [
    ByName, FromGlobals, Imported, Generic, ByAnObject, Partial, Bound, Mapped, Evaluated, Wrapped,
    WrappedByName, Described, Cached, Delegates, Calls, Unpacked, OfItsParent,
    Weak, Fuses,
]  # fmt: skip


class HarmlessByName(Plain):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = globals()["sees_nothing"](self, x)
        return found


class HarmlessPartial(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return functools.partial(sees_nothing, self)(x)


class HarmlessMap(Plain):
    def forward(self, x: Tensor) -> Tensor:
        for layer in map(operator.attrgetter("forward"), [self.conv]):
            assert layer is not None
        return self.body(x)


class HarmlessWrapper(Plain):
    @functools.cache  # noqa: B019 - a decorator without source
    def factor(self) -> int:
        return 2

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor()


def made(kind: type[Plain]) -> nn.Module:
    return models.randomize_norms_(kind()).double().eval()


@pytest.mark.parametrize("name", ["fold", "bn-to-gn{num_groups=2}", "bn-to-ln", "freeze-bn"])
@pytest.mark.parametrize("kind", READERS)
def test_what_reads_a_norm_keeps_it_however_it_was_reached(kind: type[Plain], name: str):
    result = rewrite.convert(made(kind), [name], example_inputs=X, verify=False)
    assert not result.report.changes
    assert [skip.target for skip in result.report.skips] == ["bn"]


@pytest.mark.parametrize("kind", [HarmlessByName, HarmlessPartial, HarmlessWrapper])
def test_what_reads_nothing_keeps_nothing(kind: type[Plain]):
    model = made(kind)
    result = rewrite.convert(model, ["fold"], example_inputs=X)
    assert [change.target for change in result.report.changes] == ["bn"]
    torch.testing.assert_close(result.model(X), model(X))


def test_the_reason_is_the_line_that_reads():
    result = rewrite.convert(made(ByName), ["fold"], example_inputs=X)
    (skip,) = result.report.skips
    assert skip.reason.startswith("isinstance(module.bn, nn.BatchNorm2d) at test_functions_run.py:")
    result = rewrite.convert(made(Evaluated), ["fold"], example_inputs=X)
    assert "<module>, of which the source is not known, at test_functions_run.py:" in str(
        result.report.skips[0].reason
    )


def test_a_tracing_function_is_put_back():
    def debugger(*args: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        rewrite.convert(made(ByName), ["fold"], example_inputs=X, verify=False)
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)
