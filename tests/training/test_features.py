from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
import rewrite
from rewrite.errors import OptionError
from rewrite.training import recover
from rewrite.training.distillation import Objective
from rewrite.training.features import Pair, aligned, swapped_norms
from rewrite.training.options import RecoverOptions
from rewrite.training.samples import Samples, read_samples

CHANNELS = 12


def _net(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(2, CHANNELS, 3, padding=1), norm or nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        nn.Conv2d(CHANNELS, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return models.randomize_norms_(net).double().eval()  # type: ignore[return-value]


def _samples(count: int = 20) -> Samples:
    x = torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(8)).double()
    return read_samples(_net(), [x], labels=False)


def _mixed(matrix: Tensor) -> nn.Sequential:
    """A student in whose norm's place `matrix` times the teacher's channels come out."""
    teacher = _net()
    norm = teacher[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    student = _net(nn.Conv2d(CHANNELS, CHANNELS, 1))
    student[2] = nn.Identity()
    with torch.no_grad():
        student[0].load_state_dict(teacher[0].state_dict())
        student[1].weight.copy_((matrix * scale)[:, :, None, None])
        student[1].bias.copy_(matrix @ (norm.bias - norm.running_mean * scale))
    return student


def _found(student: nn.Module) -> tuple[list[Pair], list[str]]:
    teacher = _net()
    return aligned(swapped_norms(student, teacher), student, teacher, _samples())


def test_channels_in_place_are_matched_in_place() -> None:
    pairs, notes = _found(_mixed(torch.eye(CHANNELS).double()))
    assert [pair.channels for pair in pairs] == [None] and not notes
    value = torch.randn(2, CHANNELS, 3)
    assert pairs[0].select(value, value) == (value, value)


def test_channels_in_another_order_are_matched_by_it() -> None:
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(1))
    assert bool((order != torch.arange(CHANNELS)).any())
    pairs, notes = _found(_mixed(torch.eye(CHANNELS).double()[order]))
    assert pairs[0].channels is not None
    assert torch.equal(pairs[0].channels[0], torch.arange(CHANNELS))
    assert torch.equal(pairs[0].channels[1], order)
    assert notes == ["features: channels in another order at 1: matched by it"]


def test_another_basis_is_not_matched() -> None:
    torch.manual_seed(3)
    basis = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS).double()).Q
    pairs, (note,) = _found(_mixed(basis))
    assert not pairs
    assert note == (
        "features: channels that are none of the teacher's (another basis) at 1: not matched"
    )


def test_channels_that_say_nothing_are_not_matched() -> None:
    pairs, (note,) = _found(_mixed(torch.zeros(CHANNELS, CHANNELS).double()))
    assert not pairs and "no channel that varies" in note
    student = _net(nn.Conv2d(CHANNELS, CHANNELS, 3))
    pairs, (note,) = _found(student)
    assert not pairs and "other shapes than the teacher's" in note


def _loss(student: nn.Module, matched: bool, part: slice = slice(None)) -> float:
    teacher = _net()
    pairs = swapped_norms(student, teacher)
    if matched:
        pairs, _ = aligned(pairs, student, teacher, _samples())
    options = RecoverOptions(loss="match", features=1.0)
    batch = _samples().take(torch.arange(20)[part])
    objective = Objective(options, teacher, (teacher(_samples().inputs.args[0]).detach(),))
    loss = objective(student, batch, pairs) - objective(student, batch, [])
    return float(loss.detach())


def test_a_student_that_is_the_teacher_in_another_order_has_no_error() -> None:
    student = _mixed(torch.eye(CHANNELS).double().roll(1, 0))
    assert _loss(student, matched=True) < 1e-20
    assert _loss(student, matched=False) > 1  # by place: wrong


def test_losses_of_parts_add_up() -> None:
    student = _mixed(torch.eye(CHANNELS).double() + 0.1)
    whole = _loss(student, matched=True)
    parts = [_loss(student, matched=True, part=slice(n, n + 5)) for n in range(0, 20, 5)]
    assert whole > 0.1 and sum(parts) == pytest.approx(whole, rel=1e-12)
    alone = [_loss(student, matched=False, part=slice(n, n + 5)) for n in range(0, 20, 5)]
    whole = _loss(student, matched=False)  # relative to the spread of each batch
    assert abs(sum(alone) - whole) > 1e-3 * whole


@pytest.mark.parametrize("swap", ["bn-to-gn{num_groups=4,keep=function}", "bn-to-in"])
def test_after_swaps(swap: str) -> None:
    teacher = _net().float()
    data = torch.randn(60, 2, 6, 6)
    student = rewrite.convert(teacher, [swap], calibration=[data], example_inputs=data[:2]).model
    settings = {"features": 1.0, "loss": "match", "epochs": 2}
    recovered = recover(student, teacher, [data], **settings)
    moved = any("another order" in note for note in recovered.notes)
    assert moved == ("function" in swap)
    assert recovered.after.score > recovered.before.score


@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_student_and_teacher_of_two_dtypes(wide: str) -> None:
    data = torch.randn(60, 2, 6, 6, generator=torch.Generator().manual_seed(8))

    def last(features: float, wide: str = "") -> float:
        teacher = _net().float()
        settings = {"calibration": [data], "example_inputs": data[:2]}
        student = rewrite.convert(teacher, ["bn-to-in"], **settings).model
        {"student": student, "teacher": teacher}.get(wide, nn.Identity()).double()
        return recover(student, teacher, [data], features=features).steps[-1][1]

    assert last(0.5, wide) == pytest.approx(last(0.5), rel=1e-4)
    assert last(0.5) != pytest.approx(last(0.0), rel=1e-2)


@pytest.mark.parametrize("loss", ["match", "distill"])
def test_a_global_batch_is_one_step_however_it_is_divided(loss: str) -> None:
    teacher, student = _net(), _mixed(torch.eye(CHANNELS).double().roll(1, 0))
    data = [_samples(60).inputs.args[0]]
    settings = {"features": 0.5, "loss": loss, "optimizer": "sgd", "rate": 0.1}
    results = [
        list(recover(student, teacher, data, batch_size=b, accumulate=a, **settings)
             .model.parameters())
        for b, a in ((24, 1), (8, 3), (25, 1))
    ]  # fmt: skip

    def distance(other: int) -> float:
        return max(
            float((p - q).abs().max()) for p, q in zip(results[0], results[other], strict=True)
        )

    with torch.no_grad():
        assert distance(1) < 1e-12
        assert distance(2) > 1e-6


def test_nothing_left_to_match_is_one_line() -> None:
    torch.manual_seed(3)
    basis = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS).double()).Q
    data = [_samples().inputs.args[0]]
    with pytest.raises(OptionError, match="no swapped norm has the channels of the teacher's"):
        recover(_mixed(basis), _net(), data, features=0.1, loss="match")
