"""rewrite.fold.replay: the recipes of one fold, repeated on another checkpoint."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from passes import FoldNorm, FreezeBatchNorm
from rewrite.errors import CheckpointError
from rewrite.fold.replay import apply_report

NAMES = (
    "residual", "depthwise", "grouped_transpose", "norm_norm", "shared_conv_and_norm",
    "norm_under_two_names", "norm_with_activation", "linear_norm", "parallel_branches",
    "transformer", "batch_norm_transformer", "norm_first", "functional_norm_deep",
)  # fmt: skip


def report_of(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> tuple[Any, nn.Module]:
    result = rewrite.convert(model, [FoldNorm(**options)], example_inputs=inputs, verify=False)
    return json.loads(result.report.to_json()), result.model


def second(name: str) -> nn.Module:
    """Return the same architecture with other weights and statistics."""
    model, _ = models.build(name, seed=7)
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data.mul_(torch.rand(parameter.shape, dtype=parameter.dtype) + 0.5)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_two_checkpoints_of_one_model(name: str) -> None:
    model, inputs = models.build(name)
    report, _ = report_of(model, inputs)
    other = second(name)
    _, folded = report_of(other, inputs)
    got, want = apply_report(report, other.state_dict()), folded.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert torch.allclose(got[key], want[key], rtol=1e-12, atol=1e-14), key


def test_another_checkpoint_is_not_the_first() -> None:
    model, inputs = models.build("residual")
    report, folded = report_of(model, inputs)
    got = apply_report(report, second("residual").state_dict())
    weight = next(iter(got))
    assert not torch.allclose(got[weight], folded.state_dict()[weight], rtol=1e-3)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(nn.functional.max_pool2d(self.conv(x), 2)))


def test_a_checkpoint_that_breaks_the_plan_is_refused() -> None:
    model = Pooled().eval()
    report, _ = report_of(model, (torch.randn(1, 3, 8, 8),))
    state = model.state_dict()
    state["norm.weight"] = -torch.ones(4)
    with pytest.raises(CheckpointError, match="not positive"):
        apply_report(report, state)


def test_a_shift_that_the_plan_did_not_have_is_refused() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)).eval()
    model[1].weight.data.uniform_(0.5, 2)
    report, _ = report_of(model, (torch.randn(1, 3, 8, 8),))
    state = model.state_dict()
    apply_report(report, state)
    state["1.bias"] = torch.ones(3)
    with pytest.raises(CheckpointError, match="adds something"):
        apply_report(report, state)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    model, inputs = models.build("residual")
    report, _ = report_of(model, inputs)
    with pytest.raises(CheckpointError, match="of another model"):
        apply_report(report, {"weight": torch.ones(1)})


def test_a_report_of_another_pass_is_refused() -> None:
    model, inputs = models.build("residual")
    result = rewrite.convert(model, [FreezeBatchNorm()], example_inputs=inputs, verify=False)
    with pytest.raises(CheckpointError, match="no recipe"):
        apply_report(json.loads(result.report.to_json()), model.state_dict())


def spoiled(tensor: Tensor, how: str) -> Tensor:
    """Return a tensor that is no longer what the first model had there."""
    if how in ("nan", "inf"):
        tensor = tensor.clone()
        tensor.view(-1)[1] = float(how)
        return tensor
    return {
        "longer": lambda t: torch.cat([t, t]), "one row": lambda t: t[:1].clone(),
        "one number": lambda t: t.view(-1)[0].clone(), "more axes": lambda t: t[None].clone(),
        "integers": lambda t: t.to(torch.int64), "bytes": lambda t: t.to(torch.int8),
        "truths": lambda t: t.bool(), "complex": lambda t: t.to(torch.complex64),
        "eight bits": lambda t: t.to(torch.float8_e4m3fn), "sparse": lambda t: t.to_sparse(),
    }[how](tensor)  # fmt: skip


SHAPES, KINDS = ("longer", "one row", "one number", "more axes"), (
    "integers", "bytes", "truths", "complex", "eight bits", "sparse",
)  # fmt: skip
READ = (
    "norm.running_var", "norm.running_mean", "norm.weight", "norm.bias", "conv.weight", "conv.bias",
)  # fmt: skip


def pooled_report() -> tuple[Any, dict[str, Tensor]]:
    """Return a report whose plan needs positive scales, and the state dict that it was made of."""
    model = models.randomize_norms_(Pooled().eval())
    model.norm.weight.data.abs_()
    report, _ = report_of(model, (torch.randn(1, 3, 8, 8),))
    assert len(report["passes"][0]["changes"]) == 1
    return report, model.state_dict()


@pytest.fixture(scope="module")
def pooled() -> tuple[Any, dict[str, Tensor]]:
    """Return what `pooled_report` does, once."""
    return pooled_report()


@pytest.mark.parametrize("how", [*SHAPES, *KINDS, "nan", "inf", "missing"])
@pytest.mark.parametrize("key", READ)
def test_a_tensor_that_is_none_of_the_first_model_is_refused_by_name(
    pooled: tuple[Any, dict[str, Tensor]], key: str, how: str
) -> None:
    report, state = pooled
    wrong = {name: tensor for name, tensor in state.items() if name != key}
    if how != "missing":
        wrong[key] = spoiled(state[key], how)
    told = "the checkpoint has no " if how == "missing" else ""
    why = {"nan": "not finite", "inf": "not finite", "missing": "of another model"}.get(how, "")
    why = why or ("in the model of the report" if how in SHAPES else "no numbers of floating point")
    with pytest.raises(CheckpointError, match=rf"^{told}{re.escape(key)}\b.*{why}"):
        apply_report(report, wrong)
    apply_report(report, state)


@pytest.mark.parametrize("how", [*SHAPES, *KINDS, "nan", "inf"])
def test_what_a_swap_reads_is_held_to_the_first_model_too(how: str) -> None:
    model = models.randomize_norms_(Pooled().eval())
    result = rewrite.convert(model, "bn-to-gn{num_groups=2}", verify=False)
    report, state = json.loads(result.report.to_json()), model.state_dict()
    assert apply_report(report, state).keys() == result.model.state_dict().keys()
    for key in READ:
        with pytest.raises(CheckpointError, match=rf"^{re.escape(key)} (is|holds) "):
            apply_report(report, {**state, key: spoiled(state[key], how)})


def test_a_report_without_shapes_writes_no_weight_as_integers(
    pooled: tuple[Any, dict[str, Tensor]],
) -> None:
    """Reports of version 0.1 list none."""
    report, state = json.loads(json.dumps(pooled[0])), pooled[1]
    for change in report["passes"][0]["changes"]:
        del change["shapes"]
    apply_report(report, state)
    with pytest.raises(CheckpointError, match=r"conv\.weight is stored in torch\.int8"):
        apply_report(report, {**state, "conv.weight": state["conv.weight"].to(torch.int8)})
