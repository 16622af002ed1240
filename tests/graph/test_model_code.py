"""Who else has a hold of a norm: code that tests it, reads of it, reads all, or chooses it."""

from __future__ import annotations

import copy
import functools
import logging
from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_
from rewrite.graph.capture import capture

X = torch.randn(4, 4, 6, 6, dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.bn(self.conv(x))))


class IsInstance(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.head(self.bn(y) if isinstance(self.bn, nn.BatchNorm2d) else y)


class IsInstanceInALoop(Base):
    def forward(self, x: Tensor) -> Any:
        for layer in (self.conv, self.bn, self.head):
            x = layer(x)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                x = x * 2
        return x


class TypeIs(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.head(y if type(self.bn) is nn.BatchNorm2d else -y)


class HasAttribute(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.head(y if hasattr(self.bn, "running_mean") else -y)


class ReadsFeatures(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) / self.bn.num_features


class ReadsMean(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))), self.bn.running_mean * 1


class AliasReads(Base):
    def forward(self, x: Tensor) -> Any:
        norm = self.bn
        y = norm(self.conv(x))
        return self.head(y) * (2 if norm.eps > 0 else 1)


class InAMethod(Base):
    @property
    def channels(self) -> int:
        return self.bn.num_features

    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) / self.channels


def described(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.BatchNorm2d) else 2


class InAFunction(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * described(self.bn)


class Decays(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))), sum(p.pow(2).sum() for p in self.parameters())


class ReadsState(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))), self.state_dict()["bn.weight"] * 1


class Exchanges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()

    def forward(self, x: Tensor) -> Any:
        twice = {name: p * 2 for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, twice, (x,))


class Switched(Base):
    def __init__(self) -> None:
        super().__init__()
        del self.bn
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})
        self.domain = "a"

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[self.domain](self.conv(x)))


class ByAttribute(Switched):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        y = self.norms["a"](y) if self.domain == "a" else self.norms["b"](y)
        return self.head(y)


class Closed(Base):
    def __init__(self) -> None:
        super().__init__()
        norm = self.bn
        self.apply_norm = lambda y: norm(y)
        self.later = functools.partial(described, self.bn)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.apply_norm(self.conv(x)))


class NameOfTheType(Base):
    """The name stands for another module first."""

    def forward(self, x: Tensor) -> Any:
        for layer in (self.conv, self.bn):
            x = layer(x)
        y = self.head(x)
        for layer in self.children():
            y = y * (3 if type(layer).__name__.startswith("Batch") else 1)
        return y


class NameInAComprehension(Base):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Identity())
        self.inner = nn.ModuleList([self.conv, self.bn])

    def forward(self, x: Tensor) -> Any:
        for m in self.outer:
            x = m(x)
        y = self.head(self.bn(self.conv(x)))
        return y * sum(type(m).__name__ == "BatchNorm2d" for m in self.inner)


class AsText(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * (2 if "BatchNorm" in str(self.bn) else 1)


class WholeAsText(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * (2 if "Batch" in repr(self) else 1)


class Formatted(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * len(f"{self.bn}")


class Matched(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        match self.bn:
            case nn.BatchNorm2d():
                y = y * 3
        return self.head(y)


class Listed(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * (2 if "running_mean" in dir(self.bn) else 1)


class Variables(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * len(vars(self.bn)["_buffers"])


class Getter(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * attrgetter("eps")(self.bn)


class Applies(Base):
    def forward(self, x: Tensor) -> Any:
        seen: list[str] = []
        self.apply(lambda module: seen.append(type(module).__name__))
        return self.head(self.bn(self.conv(x))) * seen.count("BatchNorm2d")


class LoopsOverAll(Base):
    def forward(self, x: Tensor) -> Any:
        for _, module in self.named_modules():
            x = x * getattr(module, "eps", 2.0)
        return self.head(self.bn(self.conv(x)))


HELD = {
    NameOfTheType: "type(layer)", NameInAComprehension: "type(m)", AsText: "str(self.bn)",
    WholeAsText: "repr(self)", Formatted: "{self.bn}", Matched: "match self.bn",
    Listed: "dir(self.bn)", Variables: "vars(self.bn)", Getter: "attrgetter('eps')(self.bn)",
    Applies: "self.apply(", LoopsOverAll: "self.named_modules()",
    IsInstance: "isinstance(self.bn", IsInstanceInALoop: "isinstance(layer",
    TypeIs: "type(self.bn)", HasAttribute: "hasattr(self.bn", ReadsFeatures: "num_features",
    ReadsMean: "running_mean", AliasReads: "norm.eps", InAMethod: "num_features",
    InAFunction: "isinstance(module", Decays: "self.parameters()", ReadsState: "self.state_dict()",
    Exchanges: "self.inner", Switched: "self.domain", ByAttribute: "self.domain",
    Closed: "hold",
}  # fmt: skip


def make(kind: type[nn.Module]) -> nn.Module:
    return randomize_norms_(kind()).double().eval()


@pytest.mark.parametrize("spec", ["fold", "bn-to-gn{num_groups=2}", "bn-to-sync-bn"])
@pytest.mark.parametrize("kind", HELD)
def test_a_norm_that_somebody_else_has_a_hold_of_stays(kind: type[nn.Module], spec: str):
    model = make(kind)
    result = rewrite.convert(model, [spec], example_inputs=(X,))
    reasons = [skip.reason for skip in result.report.skips]
    assert not result.report.changes
    assert any(HELD[kind] in reason for reason in reasons), reasons
    if kind is not Closed:
        assert any("test_model_code.py:" in reason for reason in reasons)
    one, other = model(X), result.model(X)
    for a, b in zip([one] if isinstance(one, Tensor) else one,
                    [other] if isinstance(other, Tensor) else other, strict=True):  # fmt: skip
        assert torch.equal(a, b)


# -- held in containers ------------------------------------------------------------------------


@dataclass
class Box:
    norm: nn.Module


@dataclass(frozen=True)
class FrozenBox:
    norm: nn.Module


class Holder:
    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm


class Boxed(Base):
    box: Any

    def forward(self, x: Tensor) -> Any:
        norm = self.box[0] if isinstance(self.box, deque) else self.box.norm
        return self.head(norm(self.conv(x)))


BOXES = (
    Box, FrozenBox, Holder, lambda n: SimpleNamespace(norm=n), lambda n: deque([n]),
)  # fmt: skip


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("spec", ["fold", "freeze-bn"])
def test_a_norm_in_an_object_is_exchanged_there_too(box: Any, registered: bool, spec: str):
    model = Boxed()
    model.box = box(model.bn)
    model = randomize_norms_(model).double().eval()
    if not registered:
        del model.bn
    result = rewrite.convert(model, [spec], example_inputs=(X,))
    assert result.report.ok and len(result.report.changes) == 1
    assert torch.allclose(result.model(X), model(X), rtol=0, atol=1e-12)
    held = result.model.box
    norm = held[0] if isinstance(held, deque) else held.norm
    assert not isinstance(norm, nn.BatchNorm2d)
    assert not registered or norm is result.model.bn


# -- harmless ----------------------------------------------------------------------------------


class AsksForTheType(Base):
    def forward(self, x: Tensor) -> Any:
        x = x.to(next(self.parameters()).dtype)
        return self.head(self.bn(self.conv(x)))


class AsksForTheTypeOfEach(Base):
    @property
    def kind(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x.to(self.kind))))


class ScalesByEach(Base):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn(self.conv(x))) * next(p for p in self.parameters() if p.numel())


class LooksAtAnother(Base):
    flag = True

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if self.flag and self.head is not None and isinstance(self.head, nn.Conv2d):
            y = self.head(y)
        return y


class SaysWhatItIs(Base):
    def forward(self, x: Tensor) -> Any:
        if x.dim() != 4:
            raise ValueError(f"{self} takes images")
        assert x.shape[1] == 4, str(self.bn)
        logging.getLogger(__name__).debug("%s", repr(self.bn))
        return self.head(self.bn(self.conv(x)))


class LooksForAnother(Base):
    def forward(self, x: Tensor) -> Any:
        drops = [m for m in self.modules() if isinstance(m, nn.Dropout)]
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                x = -x
        return self.head(self.bn(self.conv(x))) * (len(drops) + 1)


@pytest.mark.parametrize(
    "kind",
    [Base, AsksForTheType, AsksForTheTypeOfEach, LooksAtAnother, SaysWhatItIs, LooksForAnother],
)
def test_code_that_leaves_the_norm_alone_stops_no_fold(kind: type[nn.Module]):
    model = make(kind)
    result = rewrite.convert(model, ["fold"], example_inputs=(X,))
    assert [change.target for change in result.report.changes] == ["bn"]
    assert torch.allclose(result.model(X), model(X), rtol=0, atol=1e-12)


def test_code_that_takes_a_value_of_each_tensor_stops_the_fold():
    report = rewrite.convert(make(ScalesByEach), ["fold"], verify=False).report
    assert not report.changes and "reads all tensors" in report.skips[0].reason


class WithRaw(Base):
    def raw(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def names(self) -> list[str]:
        return ["a"]


def test_methods_beside_forward_that_read_what_changed_are_named():
    notes = rewrite.convert(make(WithRaw), ["fold"], example_inputs=(X,)).report.notes
    assert [note for note in notes if "WithRaw.raw() reads conv" in note]
    assert not [note for note in notes if "names()" in note]


def test_what_a_forward_assigns_is_known():
    class Assigns(Base):
        def forward(self, x: Tensor) -> Any:
            self.bn.bias.data.zero_()
            self.conv.stride = (1, 1)
            return super().forward(x)

    code = capture(Assigns()).code
    assert code.assigned("bn") == {"bias"} and code.assigned("conv") == {"stride"}


class RawBranches(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x) + self.other(x)

    def norm_of_weight(self) -> Tensor:
        return self.other.weight.norm()


def test_a_method_that_reads_a_layer_which_is_gone_is_named():
    notes = rewrite.convert(make(RawBranches), ["fold"], example_inputs=X).report.notes
    (note,) = [note for note in notes if "norm_of_weight" in note]
    assert note == "RawBranches.norm_of_weight() reads other, which is gone: it no longer runs"


class CountsModules(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * len(list(self.modules()))


class LooksAtType(Base):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (2.0 if type(self.conv) is nn.Conv2d else 1.0)


class WritesByInit(Base):
    def forward(self, x: Tensor) -> Any:
        nn.init.constant_(self.conv.weight, 0.1)
        return super().forward(x)


class WritesAnItem(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.conv.weight[0] = 0.5
        return super().forward(x)


class Decays(Base):
    def forward(self, x: Tensor) -> Any:
        self.conv.weight.data.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize(
    "kind", [CountsModules, LooksAtType, WritesByInit, WritesAnItem, Decays, Base]
)
@pytest.mark.parametrize("name", ["weight-norm", "weight-standardize"])
def test_a_weight_that_code_writes_or_counts_stays_a_parameter(kind, name):
    model = make(kind)
    wanted = copy.deepcopy(model)
    result = rewrite.convert(model, name, example_inputs=X, verify=False)
    named = {change.target for change in result.report.changes}
    assert ("conv" in named) is (kind is Base)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(result.model(X), wanted(X), rtol=0, atol=1e-11)
