"""rewrite.fold.replay: the recipes of one fold, repeated on another checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import models
import rewrite
from passes import FoldNorm, FreezeBatchNorm
from rewrite.cli.main import main
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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_command(tmp_path: Path, suffix: str) -> None:
    model, inputs = models.build("residual")
    report, _ = report_of(model, inputs)
    (tmp_path / "report.json").write_text(json.dumps(report))
    other = second("residual")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    out = tmp_path / f"folded.{suffix}"
    code = main(["apply-map", str(tmp_path / "report.json"), str(tmp_path / "other.pt"), str(out)])
    assert code == 0
    got = load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    _, folded = report_of(other, inputs)
    folded.load_state_dict(got)
    with torch.no_grad():
        want = other(*inputs)
        assert torch.allclose(folded(*inputs), want, rtol=1e-10, atol=1e-12)


def test_the_command_complains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("no json")
    code = main(["apply-map", str(tmp_path / "report.json"), "x.pt", str(tmp_path / "out.pt")])
    assert code == 2
    assert "no report can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"passes": 3}',
        '{"passes": [3]}',
        '{"passes": [{"changes": [{"recipe": {"do": "norm"}, "keys": {}, "target": "x"}]}]}',
        '{"passes": [{"changes": [{"recipe": 7, "keys": {}, "target": "x"}]}]}',
        "[" * 100_000,
        "\xff\xfe",
    ],
    ids=range(7),
)
def test_a_report_that_is_damaged_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    names = [str(tmp_path / name) for name in ("report.json", "x.pt", "out.pt")]
    assert main(["apply-map", *names]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()
