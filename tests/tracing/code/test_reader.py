"""rewrite.tracing.code.reader: what one function does with modules: choices, tests, assignments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from models.randomize import randomize_norms_

X = torch.randn(2, 3, 6, 6, dtype=torch.float64)


class Domains(nn.Module):
    """One norm a domain; `pick` says how the forward comes by that of its domain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.bn_a, self.bn_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.domain = "a"

    def forward(self, x: Tensor) -> Any:
        return self.head(self.pick()(self.conv(x)))

    def pick(self) -> nn.Module:
        raise NotImplementedError


class ByText(Domains):
    def pick(self) -> Any:
        return getattr(self, f"bn_{self.domain}")


class ByASum(Domains):
    def pick(self) -> Any:
        return getattr(self, "bn_" + self.domain)


class BySubmodule(Domains):
    def pick(self) -> Any:
        return self.get_submodule("bn_{}".format(self.domain))  # noqa: UP032 - another spelling


class ByModules(Domains):
    def pick(self) -> Any:
        return self._modules["bn_" + self.domain]


class ByChildren(Domains):
    def pick(self) -> Any:
        return dict(self.named_children())["bn_" + self.domain]


class ByDict(Domains):
    def pick(self) -> Any:
        domain = self.domain
        return {"a": self.bn_a, "b": self.bn_b}[domain]


class ByList(Domains):
    def pick(self) -> Any:
        return [self.bn_a, self.bn_b][int(self.domain == "b")]


class ByExpression(Domains):
    def pick(self) -> Any:
        return self.bn_a if self.domain == "a" else self.bn_b


class ByStatement(Domains):
    def pick(self) -> Any:
        norm = self.bn_b
        if self.domain == "a":
            norm = self.bn_a
        return norm


class ByMatch(Domains):
    def pick(self) -> Any:
        match self.domain:
            case "a":
                return self.bn_a
            case _:
                return self.bn_b


class ByPointer(Domains):
    def __init__(self) -> None:
        super().__init__()
        self.current = self.bn_a

    def use(self, domain: str) -> None:
        self.current = self.bn_b if domain == "b" else self.bn_a

    def pick(self) -> Any:
        return self.current


CHOSEN = [
    ByText, ByASum, BySubmodule, ByModules, ByChildren, ByDict, ByList, ByExpression, ByStatement,
    ByMatch, ByPointer,
]  # fmt: skip


@pytest.mark.parametrize("kind", CHOSEN)
def test_a_norm_that_an_attribute_chooses_stays(kind: type[nn.Module]) -> None:
    model = randomize_norms_(kind()).double().eval()
    report = rewrite.convert(model, ["fold"], example_inputs=(X,)).report
    reasons = {skip.target: skip.reason for skip in report.skips}
    assert not report.changes
    assert "chooses it by an attribute" in reasons["bn_a"] or "assigned at" in reasons["bn_a"]


class ByConstant(Domains):
    def pick(self) -> Any:
        return getattr(self, "bn_a")  # noqa: B009 - the spelling is what is tried


class ByConstantModules(Domains):
    def pick(self) -> Any:
        return self._modules["bn_a"]


class ByConstantDict(Domains):
    def pick(self) -> Any:
        return {"a": self.bn_a, "b": self.bn_b}["a"]


class AnotherIsChosen(Domains):
    """The attribute chooses an activation by another pattern of names, not the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.act_a, self.act_b = nn.ReLU(), nn.Tanh()

    def forward(self, x: Tensor) -> Any:
        return getattr(self, f"act_{self.domain}")(self.bn_a(self.conv(x)))


@pytest.mark.parametrize("kind", [ByConstant, ByConstantModules, ByConstantDict, AnotherIsChosen])
def test_a_norm_by_a_name_that_stays_is_folded(kind: type[nn.Module]) -> None:
    model = randomize_norms_(kind()).double().eval()
    result = rewrite.convert(model, ["fold"], example_inputs=(X,))
    assert [change.target for change in result.report.changes] == ["bn_a"]
    assert torch.allclose(result.model(X), model(X), rtol=0, atol=1e-12)


class ReadsByName(Domains):
    def __init__(self) -> None:
        super().__init__()
        del self.bn_b

    def forward(self, x: Tensor) -> Any:
        return self.head(self.bn_a(self.conv(x))) * getattr(self.bn_a, "momentum", 1.0)


class LoadsAnother(nn.Module):
    """A momentum encoder that is loaded from its teacher at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.teacher = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Any:
        self.teacher.load_state_dict(self.student.state_dict())
        return self.student(x), self.teacher(x)


@pytest.mark.parametrize("spec", ["fold", "bn-to-gn{num_groups=2}"])
@pytest.mark.parametrize(
    ("kind", "line"), [(ReadsByName, "getattr(self.bn_a"), (LoadsAnother, "load_state_dict")]
)
def test_a_norm_that_is_read_by_name_or_loaded_stays(
    kind: type[nn.Module], line: str, spec: str
) -> None:
    model = randomize_norms_(kind()).double().eval()
    result = rewrite.convert(model, [spec], verify=False)
    reasons = [skip.reason for skip in result.report.skips]
    assert not result.report.changes
    assert any(line in reason for reason in reasons), reasons
