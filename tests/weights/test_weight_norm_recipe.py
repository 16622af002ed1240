"""Weight norm put on and taken off by what a report holds: the same bits as in memory."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import rewrite
from passes import RemoveWeightNorm, WeightNorm
from rewrite.errors import CheckpointError
from rewrite.fold.replay import apply_report


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return layers of several layouts, and two that share a weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Unflatten(1, (8, 1)),
        nn.ConvTranspose1d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(18, 4),
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        model[0].weight[2] = 0
    model[2].weight = model[1].weight
    return model


def normed(seed: int, old: bool = False) -> nn.Module:
    """Return layers whose weights PyTorch norms, along several axes, in either form."""
    torch.manual_seed(seed)
    make = nn.utils.weight_norm if old else weight_norm
    layers = [make(nn.Linear(5, 6)), make(nn.Linear(6, 4), dim=1), make(nn.Linear(4, 3), dim=None)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("original0", "_g")):
                tensor.mul_(1.7)
    return model


def replayed(report: rewrite.Report, model: nn.Module) -> dict[str, torch.Tensor]:
    return apply_report(json.loads(report.to_json()), model.state_dict())


def check_equal(made: dict[str, torch.Tensor], model: nn.Module) -> None:
    wanted = model.state_dict()
    assert set(made) == set(wanted)
    assert [key for key, value in wanted.items() if not torch.equal(made[key], value)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_put_on_another_checkpoint(dtype: torch.dtype) -> None:
    report = rewrite.convert(network(0), WeightNorm(), verify=False).report
    other = network(1, dtype)
    wanted = rewrite.convert(other, WeightNorm(), verify=False).model
    made = replayed(report, other)
    check_equal(made, wanted)
    # The negative twin: it is the other checkpoint's, not the first one's.
    first = rewrite.convert(network(0), WeightNorm(), verify=False).model.state_dict()
    assert not torch.equal(made["6.parametrizations.weight.original0"].float(),
                           first["6.parametrizations.weight.original0"])  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("old", [False, True])
def test_a_norm_is_taken_off_another_checkpoint(old: bool) -> None:
    report = rewrite.convert(normed(0, old), RemoveWeightNorm(), verify=False).report
    other = normed(1, old)
    wanted = rewrite.convert(other, RemoveWeightNorm(), verify=False).model
    made = replayed(report, other)
    check_equal(made, wanted)
    assert set(made) == {f"{layer}.{key}" for layer in range(3) for key in ("weight", "bias")}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_names_become_new_ones() -> None:
    model = normed(0, old=True)
    result = rewrite.convert(model, WeightNorm(), verify=False)
    check_equal(replayed(result.report, model), result.model)


def test_a_checkpoint_without_the_tensors_is_refused() -> None:
    report = rewrite.convert(normed(0), RemoveWeightNorm(), verify=False).report
    with pytest.raises(CheckpointError, match="it is of another model"):
        replayed(report, nn.Sequential(nn.Conv1d(2, 2, 1)))


def test_a_norm_fitted_to_data_leaves_no_recipe() -> None:
    batch = [torch.randn(4, 5)]
    result = rewrite.convert(normed(0), RemoveWeightNorm(), verify=False)
    fitted = rewrite.convert(result.model, WeightNorm(data_init=True), calibration=batch)
    assert fitted.report.changes and not any(c.recipe for c in fitted.report.changes)
