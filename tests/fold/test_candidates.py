"""What can be folded: the candidates of a model in data-flow order, with what refuses them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.randomize import randomize_norms_
from rewrite.affine.ledger import Ledger
from rewrite.affine.planner import Planner
from rewrite.fold.candidates import Source, sources
from rewrite.graph.capture import capture


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.shift


class Mixed(nn.Module):
    """A constant chain in front of a LayerNorm, then a BatchNorm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.ln, self.scale = nn.BatchNorm1d(4), nn.LayerNorm(4), LayerScale()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(self.bn(self.fc(self.ln(self.scale(x))))))


def found(model: nn.Module, *inputs: Tensor) -> list[Source]:
    captured = capture(
        model.double().eval(), example_inputs=inputs or (torch.randn(3, 4).double(),)
    )
    return list(sources(Planner(captured)))


def one(model: nn.Module, *inputs: Tensor) -> Source:
    return found(model, *inputs)[0]


def test_candidates_come_in_data_flow_order_each_layer_once() -> None:
    constant, gain, norm = found(Mixed())
    assert [(s.kind, s.target) for s in (constant, gain, norm)] == [
        ("constant", "scale"), ("gain", "ln"), ("norm", "bn")
    ]  # fmt: skip
    assert [s.refusal for s in (constant, gain, norm)] == ["", "", ""]
    assert norm.before == "BatchNorm1d(4)" and gain.before == "LayerNorm(4)"
    assert len(norm.first) == 2 and norm.first == norm.last == norm.nodes


def test_a_chain_of_constants_is_one_map() -> None:
    model = Mixed()
    constant = found(model)[0]
    assert constant.before == "mul add by a constant per channel"
    assert len(constant.nodes) == 2 and list(constant.inputs) == [constant.first[0]]
    affine = constant.affine(Ledger(lambda ref: torch.zeros(())))
    torch.testing.assert_close(affine.scale, model.scale.gamma.detach())
    torch.testing.assert_close(affine.shift, model.scale.shift.detach())
    passes_on = constant.passes_on
    assert passes_on[constant.last[0]] is constant.first[0], "x + d passes on x * c"


def test_the_map_of_a_norm_is_that_of_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    randomize_norms_(model)
    captured = capture(model.double().eval())
    (source,) = sources(Planner(captured))
    x = torch.randn(3, 4, dtype=torch.float64)
    affine = source.affine(Ledger(captured.tensor))
    torch.testing.assert_close(x * affine.scale + affine.shift, model(x))


def batch_norm(**options: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, **options))


class Functional(nn.Module):
    def __init__(self, training: bool) -> None:
        super().__init__()
        self.bn, self.mode = nn.BatchNorm1d(4), training

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.mode)


def hooked() -> nn.Module:
    model = batch_norm()
    model[1].register_forward_hook(lambda *args: None)
    return model


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (batch_norm(track_running_stats=False), "has no running statistics"),
        (Functional(True), "is in training mode"),
        (nn.Sequential(nn.LayerNorm(4, elementwise_affine=False)), "has no affine part"),
        (hooked(), "its call is more than a normalization"),
        (Chooses(), "is opaque"),
        (batch_norm().to("meta"), "has no values (it is on the meta device)"),
    ],
)
def test_what_no_surroundings_can_make_foldable_is_refused(model: nn.Module, reason: str) -> None:
    captured = capture(model.eval())
    source = next(iter(sources(Planner(captured))))
    assert reason in source.refusal, source.refusal


@pytest.mark.parametrize("model", [batch_norm(), Functional(False), nn.Sequential(nn.LayerNorm(4))])
def test_its_neighbour_that_can_be_folded_is_not_refused(model: nn.Module) -> None:
    assert one(model).refusal == ""


def test_a_constant_that_is_not_per_channel_is_a_candidate_that_is_declined() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    source = one(Square())
    assert source.kind == "constant" and source.target == "table"
    assert source.before == "mul by a constant" and source.refusal


def test_a_model_without_norms_and_constants_has_no_candidate() -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []
