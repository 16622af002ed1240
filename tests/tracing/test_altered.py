"""rewrite.tracing.altered: what a forward does to its layers, in whatever spelling."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_
from rewrite.graph.capture import capture

X = torch.randn(2, 3, 6, 6, dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.other = nn.BatchNorm2d(4)
        self.begin()

    def begin(self) -> None:
        """What a subclass holds as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)))


class Assigns(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.eps = 1.0
        return super().forward(x)


class SetsByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        setattr(self.bn, "ep" + "s", self.bn.eps + 0.5)
        return super().forward(x)


class Control:
    """What no code hands a module to: it knows its norm itself."""

    def __init__(self, norm: nn.Module) -> None:
        self.norms = {"bn": norm}

    def step(self) -> None:
        for norm in self.norms.values():
            norm.eps = norm.eps + 0.5


class ByAnObject(Base):
    def begin(self) -> None:
        self.control = Control(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        self.control.step()
        return super().forward(x)


class Statistics(Base):
    def begin(self) -> None:
        self.means = [torch.randn(4, dtype=torch.float64) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        self.bn.running_mean = self.means[0]
        self.means.reverse()
        return super().forward(x)


class Mode(Base):
    adapts = False

    def forward(self, x: Tensor) -> Tensor:
        self.bn.training = self.adapts
        return super().forward(x)


class PingPong(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.bn, self.other = self.other, self.bn
        return y


class SetsModules(Base):
    def forward(self, x: Tensor) -> Tensor:
        y, held = super().forward(x), (self.bn, self.other)
        for name, module in zip(("other", "bn"), held, strict=True):
            setattr(self, name, module)
        return y


class InAList(Base):
    def begin(self) -> None:
        self.norms = [self.bn, self.other]

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.norms[0](self.conv(x)))
        self.norms.append(self.norms.pop(0))
        return y


class InADeque(InAList):
    def begin(self) -> None:
        self.norms = deque([self.bn, self.other])

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.norms[0](self.conv(x)))
        self.norms.rotate(1)
        return y


class InANamespace(Base):
    def begin(self) -> None:
        self.norms = SimpleNamespace(now=self.bn, then=self.other)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.norms.now(self.conv(x)))
        self.norms.now, self.norms.then = self.norms.then, self.norms.now
        return y


class AfterTheFirst(Base):
    """A forward that puts a module away while it is traced cannot be traced a second time."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.fused:
            self.bn, self.fused = nn.Identity(), True
        return y


class Chooses(Base):
    def begin(self) -> None:
        self.calls, self.conv2 = 0, nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        conv = self.conv if self.calls % 2 else self.conv2
        return self.head(self.bn(conv(x)).relu())


ALTERED = (
    Assigns, SetsByName, ByAnObject, Statistics, Mode, PingPong, SetsModules, InAList, InADeque,
    InANamespace, AfterTheFirst, Chooses,
)  # fmt: skip


class Momentum(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.momentum = 0.01
        return super().forward(x)


class Notes(Base):
    def begin(self) -> None:
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1.0)
        self.conv.calls = len(self.seen)
        self.last = self.conv(x)
        return self.head(self.bn(self.last.clone()))


class Moves(Base):
    """Only numbers move."""

    def begin(self) -> None:
        self.weights = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        self.weights.reverse()
        return super().forward(x)


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms_(kind()).double().eval()


@pytest.mark.parametrize("kind", ALTERED)
@pytest.mark.parametrize("name", ["fold", "rebalance"])
def test_what_a_forward_alters_is_not_rewritten(kind: type[nn.Module], name: str) -> None:
    model, wanted = make(kind), make(kind)
    report = rewrite.convert(model, name, example_inputs=X, verify=False)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(report.model(X), wanted(X), rtol=0, atol=1e-12)
    assert name != "fold" or not report.report.changes


@pytest.mark.parametrize("kind", [k for k in ALTERED if k not in (Chooses, InADeque)])
def test_nor_is_another_norm_put_in_its_place(kind: type[nn.Module]) -> None:
    report = rewrite.convert(make(kind), "bn-to-in", example_inputs=X, verify=False).report
    assert "bn" not in {change.target for change in report.changes}


@pytest.mark.parametrize("kind", [Momentum, Notes, Moves])
def test_what_changes_nothing_in_eval_mode_folds(kind: type[nn.Module]) -> None:
    model, wanted = make(kind), make(kind)
    result = rewrite.convert(model, "fold", example_inputs=X)
    assert [change.target for change in result.report.changes] == ["bn"]
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(result.model(X), wanted(X), rtol=0, atol=1e-12)


def test_the_reason_names_the_line_or_what_was_seen() -> None:
    captured = capture(make(Assigns), X)
    assert "self.bn.eps is assigned at test_altered.py:" in str(captured.unsteady("bn"))
    assert captured.unsteady("conv") is None
    by_an_object = str(capture(make(ByAnObject), X).unsteady("bn"))
    assert "norm.eps is assigned at test_altered.py:" in by_an_object
    assert "may move it" in str(capture(make(InADeque), X).unsteady("bn"))


@pytest.mark.parametrize("kind", ALTERED)
def test_the_model_itself_is_as_it_was(kind: type[nn.Module]) -> None:
    model = make(kind)
    held = {name: (dict(vars(m)), dict(m._modules)) for name, m in model.named_modules()}
    capture(model, X)
    for name, module in model.named_modules():
        before, children = held[name]
        assert before.keys() == vars(module).keys()
        assert all(vars(module)[key] is value for key, value in before.items())
        assert all(module._modules[key] is child for key, child in children.items())
