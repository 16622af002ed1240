from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from passes import BatchNormToGroupNorm
from rewrite.graph.capture import capture
from rewrite.graph.operators import norm_of
from rewrite.nn.modules import ChannelAffine
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model
from rewrite.runtime.hooks import hooked
from rewrite.runtime.leaves import tensors
from rewrite.swap.anchor import anchored_norms, gain
from rewrite.swap.standardize import standardize

ANCHOR = 2.0
_NAMES = tuple(models.all_models())


def convert(model: nn.Module, **options: object) -> tuple[nn.Module, tuple[str, ...]]:
    applied = apply_pass(BatchNormToGroupNorm(anchor=ANCHOR, **options), copy_model(model))  # type: ignore[arg-type]
    return applied.model, tuple(change.note for change in applied.changes)


def outputs_as_affine(model: nn.Module, inputs: tuple[object, ...]) -> list[torch.Tensor]:
    """Run a converted model with each anchored norm replaced by γ z + β."""
    norms = [module for _, module in anchored_norms(model)]

    def affine(index: int, z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, *(1,) * (z.dim() - 2))
        bias = norms[index].bias
        shift = 0 if bias is None else bias.reshape(shape)  # type: ignore[operator]
        return z * norms[index].weight.reshape(shape) / gain(ANCHOR) + shift  # type: ignore[operator]

    with hooked(norms, affine), torch.no_grad():
        return tensors(model(*inputs))


@pytest.mark.parametrize("name", _NAMES)
def test_every_norm_reads_standardized_channels(name: str) -> None:
    model, inputs = models.build(name)
    model.eval()
    converted, notes = convert(model)
    if not notes or any("no running statistics" in note for note in notes):
        pytest.skip("has no norm with running statistics that can be replaced")
    with torch.no_grad():
        try:
            expected = tensors(model(*inputs))
        except Exception as error:  # noqa: BLE001 - some models are there to be refused
            pytest.skip(f"does not run: {error}")
    found = outputs_as_affine(converted, inputs)
    tolerance = 1e-10 if expected[0].dtype == torch.float64 else 0.05
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max() + 1))


def test_the_check_above_notices_statistics_that_stay() -> None:
    model = models.randomize_norms_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    model.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    converted, _ = convert(model)
    converted[0].weight.data *= 1.01  # type: ignore[operator]
    assert not torch.allclose(outputs_as_affine(converted, (x,))[0], model(x), atol=1e-3)


def test_producers_take_the_statistics_up() -> None:
    model = models.randomize_norms_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    converted, notes = convert(model)
    assert type(converted[1]) is nn.GroupNorm and "statistics in 0" in notes[0]
    sigma = (model[1].running_var + model[1].eps).sqrt()
    torch.testing.assert_close(converted[0].weight, model[0].weight / sigma[:, None, None, None])


def test_an_affine_stands_in_front_where_no_producer_can() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)).eval()
    converted, notes = convert(models.randomize_norms_(model))
    assert isinstance(converted[2].affine, ChannelAffine) and "in front" in notes[0]
    assert converted[2].affine.weight.requires_grad
    assert torch.equal(converted[0].weight, model[0].weight)


def test_a_shared_producer_is_left_alone() -> None:
    model, _ = models.build("two_norms_one_conv")
    converted, notes = convert(model)
    assert all("in front" in note for note in notes) and len(notes) == 2
    assert torch.equal(
        dict(model.named_parameters())["conv.weight"],
        dict(converted.named_parameters())["conv.weight"],
    )


@pytest.mark.parametrize(("var", "eps"), [(0.0, 1e-5), (5.6e-45, 1e-5), (0.0, 0.0), (1e-9, 1.0)])
def test_degenerate_variances_stay_finite(var: float, eps: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=eps)).eval()
    models.randomize_norms_(model)
    model[1].running_var[2] = var
    model[1].weight.data[3:5] = torch.tensor([0.0, -1.0])
    converted, _ = convert(model)
    assert all(torch.isfinite(p).all() for p in converted.parameters())
    assert torch.isfinite(converted(torch.randn(2, 3, 6, 6))).all()


def test_half_precision_that_would_overflow_keeps_its_producer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-10)).half().eval()
    model[0].weight.data.fill_(30.0)
    model[1].running_var.fill_(1e-7)
    converted, notes = convert(model)
    assert "overflow" in notes[0] and torch.equal(converted[0].weight, model[0].weight)


def test_norms_without_statistics_are_said_to_have_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    converted, notes = convert(model)
    assert "no running statistics" in notes[0] and converted[1].eps == model[1].eps


def test_norms_keep_their_own_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    models.randomize_norms_(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    captured = capture(copy_model(model))
    norms = [n for node in captured.nodes() if (n := norm_of(captured, node)) is not None]
    standardize(captured, norms)
    for key in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(captured.model.state_dict()[key], before[key])
    assert not torch.equal(captured.model.state_dict()["0.weight"], before["0.weight"])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
