"""The recipe of a norm swap, run on another checkpoint of the architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from rewrite.cli.main import main
from rewrite.errors import CheckpointError
from rewrite.fold.replay import apply_report
from tests.fold.test_replay import second

NAMES = (
    "residual", "depthwise", "grouped_transpose", "norm_norm", "shared_conv_and_norm",
    "norm_under_two_names", "norm_with_activation", "parallel_branches",
)  # fmt: skip
SPECS = (
    "bn-to-gn", "bn-to-gn{num_groups=2,anchor=30}", "bn-to-gn{keep=affine}",
    "bn-to-gn{keep=nothing}", "bn-to-gn{anchor=0}", "bn-to-in", "bn-to-ln", "bn-to-ln{over=c}",
)  # fmt: skip


def _convert(model: nn.Module, spec: str, inputs: tuple[Any, ...]) -> Any:
    return rewrite.convert(model, [spec], example_inputs=inputs, verify=False)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_it_writes_what_a_conversion_of_that_checkpoint_would(name: str, spec: str) -> None:
    model, inputs = models.build(name)
    first = _convert(model, spec, inputs)
    report = json.loads(first.report.to_json())
    assert report["passes"][0]["changes"]
    other = second(name)
    want = _convert(other, spec, inputs).model.state_dict()
    got = apply_report(report, other.state_dict())
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        assert torch.allclose(got[key], want[key], rtol=1e-12, atol=1e-14), key
    first.model.load_state_dict(got)


def test_the_first_checkpoint_is_another() -> None:
    """The negative twin: the values are not those of the model that was converted."""
    model, inputs = models.build("residual")
    first = _convert(model, "bn-to-gn", inputs)
    report = json.loads(first.report.to_json())
    got = apply_report(report, second("residual").state_dict())
    own = apply_report(report, model.state_dict())
    held = first.model.state_dict()
    assert all(torch.equal(own[key], held[key]) for key in held)
    assert not any(torch.allclose(got[key], held[key], rtol=1e-3) for key in held)


def test_a_fit_to_data_has_no_recipe() -> None:
    model, inputs = models.build("residual")
    result = rewrite.convert(
        model, ["bn-to-gn{keep=function}"], example_inputs=inputs, verify=False,
        calibration=[torch.randn(16, *inputs[0].shape[1:], dtype=inputs[0].dtype)],
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="leaves no recipe for other checkpoints"):
        apply_report(json.loads(result.report.to_json()), model.state_dict())


class Written(nn.Module):
    """The model itself holds the tensors of a line: the new norm stands beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.batch_norm(self.conv(x), self.mean, self.var))


def test_a_norm_in_a_line_has_no_recipe() -> None:
    model = Written().eval()
    result = _convert(model, "bn-to-gn", (torch.randn(2, 3, 6, 6),))
    assert result.report.passes[0].changes
    with pytest.raises(CheckpointError, match="no recipe"):
        apply_report(json.loads(result.report.to_json()), model.state_dict())


@pytest.mark.parametrize("key", ["weight", "running_var"])
def test_another_model_is_refused(key: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    report = json.loads(_convert(model, "bn-to-gn", (torch.randn(2, 3, 6, 6),)).report.to_json())
    state = model.state_dict()
    del state[f"1.{key}"]
    with pytest.raises(CheckpointError, match=rf"has no 1\.{key}"):
        apply_report(report, state)


BROKEN = [
    ("running_var", -1.0, r"1\.running_var is negative \(-1, and eps is 1e-05\)"),
    ("running_var", float("nan"), r"1\.running_var holds values that are not finite"),
    ("running_mean", float("inf"), r"1\.running_mean holds values that are not finite"),
]


@pytest.mark.parametrize("spec", ["bn-to-gn", "bn-to-in", "bn-to-ln", "bn-to-gn{keep=affine}"])
@pytest.mark.parametrize(("key", "value", "told"), BROKEN)
def test_statistics_that_are_no_map_are_refused_by_name_where_they_are_kept(
    spec: str, key: str, value: float, told: str
) -> None:
    """One channel of them would have been passed on as it came: silently another model."""
    inputs = (torch.randn(2, 3, 6, 6),)
    model = models.randomize_norms_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    report = json.loads(_convert(model, spec, inputs).report.to_json())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[f"1.{key}"][2] = value
    model.load_state_dict(state)
    converted = _convert(model, spec, inputs).report
    if "affine" in spec and value == -1.0:  # what is not kept may be anything, and is dropped
        assert apply_report(report, state).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
        assert len(converted.changes) == 1
        return
    with pytest.raises(CheckpointError, match=told):
        apply_report(report, state)
    if "affine" not in spec:
        assert not converted.changes
        assert [bool(re.search(told, skip.reason)) for skip in converted.skips] == [True]


def test_values_that_do_not_fit_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half().eval()
    spec = "bn-to-gn{anchor=30}"
    report = json.loads(_convert(model, spec, (torch.randn(2, 3, 6, 6).half(),)).report.to_json())
    state = model.state_dict()
    state["1.weight"] = torch.full((4,), 60000.0, dtype=torch.half)
    with pytest.raises(CheckpointError, match=r"1\.weight would hold values that are not finite"):
        apply_report(report, state)


def test_the_command(tmp_path: Path) -> None:
    model, inputs = models.build("residual")
    report = tmp_path / "report.json"
    report.write_text(_convert(model, "bn-to-gn", inputs).report.to_json(), encoding="utf-8")
    other = second("residual")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    target = tmp_path / "swapped.pt"
    assert main(["apply-map", str(report), str(tmp_path / "other.pt"), str(target)]) == 0
    want = _convert(other, "bn-to-gn", inputs).model.state_dict()
    got = torch.load(target)
    assert all(torch.allclose(got[key], want[key], rtol=1e-12, atol=1e-14) for key in want)
