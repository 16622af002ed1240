from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewrite.errors import OptionError
from rewrite.training import LabelSmoothing, OnlineLabelSmoothing


def test_smoothed_labels_are_a_mixture_with_the_uniform_ones() -> None:
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    target = 0.9 * F.one_hot(labels, 5).double() + 0.1 / 5
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(LabelSmoothing(0.1)(logits, labels), expected, rtol=0, atol=1e-14)
    assert abs(LabelSmoothing(0.2)(logits, labels) - expected) > 1e-3


def _reference(
    epochs: list[list[tuple[torch.Tensor, torch.Tensor]]], classes: int, alpha: float
) -> list[float]:
    """Zhang et al. 2020, algorithm 1, sample by sample."""
    soft = [[1 / classes] * classes for _ in range(classes)]
    losses = []
    for batches in epochs:
        sums = [[0.0] * classes for _ in range(classes)]
        counts = [0] * classes
        for logits, labels in batches:
            total = 0.0
            for z, y in zip(logits, labels.tolist(), strict=True):
                p = torch.softmax(z, 0).tolist()
                log = torch.log_softmax(z, 0).tolist()
                total += -alpha * log[y]
                total += -(1 - alpha) * sum(soft[y][k] * log[k] for k in range(classes))
                if max(range(classes), key=p.__getitem__) == y:
                    counts[y] += 1
                    sums[y] = [a + b for a, b in zip(sums[y], p, strict=True)]
            losses.append(total / len(labels))
        for y in range(classes):
            if counts[y]:
                soft[y] = [value / counts[y] for value in sums[y]]
    return losses


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_online_labels_are_those_of_the_paper(alpha: float) -> None:
    epochs = [
        [(3 * torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 4, (8,))) for _ in range(3)]
        for _ in range(3)
    ]
    loss = OnlineLabelSmoothing(4, alpha).double()
    found = []
    for batches in epochs:
        found.extend(float(loss(*batch)) for batch in batches)
        loss.next_epoch()
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(_reference(epochs, 4, alpha)), rtol=0, atol=1e-12
    )
    if alpha == 0.5:
        assert abs(found[-1] - _reference(epochs, 4, 0.9)[-1]) > 1e-3


def test_evaluation_adds_nothing_and_a_class_that_was_never_right_keeps_its_labels() -> None:
    loss = OnlineLabelSmoothing(3)
    logits, labels = torch.eye(3)[[0, 1]] * 5, torch.tensor([0, 1])
    loss.eval()(logits, labels)
    assert loss.next_epoch() == (0, 1, 2)
    loss.train()(logits, labels)
    assert loss.next_epoch() == (2,)
    torch.testing.assert_close(loss.soft[2], torch.full((3,), 1 / 3))
    torch.testing.assert_close(loss.soft[0], logits[0].softmax(0))


def test_a_state_dict_resumes_the_epoch() -> None:
    loss, other = OnlineLabelSmoothing(4), OnlineLabelSmoothing(4)
    batch = 3 * torch.randn(16, 4), torch.randint(0, 4, (16,))
    loss(*batch)
    other.load_state_dict(loss.state_dict())
    loss.next_epoch()
    other.next_epoch()
    assert torch.equal(loss.soft, other.soft) and not torch.equal(loss.soft[0], loss.soft[1])


def test_maps_and_ignored_positions() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = -100
    known = labels != -100
    rows = logits.movedim(1, -1)[known]
    for loss in (LabelSmoothing(0.1), OnlineLabelSmoothing(3).eval()):
        torch.testing.assert_close(loss(logits, labels), loss(rows, labels[known]))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label: int) -> None:
    for loss in (LabelSmoothing(), OnlineLabelSmoothing(3)):
        with pytest.raises(OptionError, match=f"label {label} is out of range: .* 3 classes"):
            loss(torch.randn(1, 3), torch.tensor([label]))
        with pytest.raises(OptionError, match=r"torch\.int64"):
            loss(torch.randn(1, 3), torch.tensor([0.5]))


def test_options_out_of_range() -> None:
    for make, reason in (
        (lambda: LabelSmoothing(1.5), "smoothing is 1.5"),
        (lambda: LabelSmoothing(reduction="avg"), "reduction is 'avg'"),
        (lambda: OnlineLabelSmoothing(1), "of 1 classes"),
        (lambda: OnlineLabelSmoothing(3, alpha=-0.1), "alpha is -0.1"),
    ):
        with pytest.raises(OptionError, match=reason):
            make()
    with pytest.raises(OptionError, match="4 logits for the 3 classes"):
        OnlineLabelSmoothing(3)(torch.randn(1, 4), torch.tensor([0]))


@pytest.mark.parametrize("loss", [LabelSmoothing(), OnlineLabelSmoothing(3)])
@pytest.mark.parametrize(
    ("logits", "labels"), [((6, 3), (6, 1)), ((6, 3), (3,)), ((2, 3, 4, 5), (2, 5, 4)), ((3,), ())]
)
def test_labels_of_another_shape(
    loss: nn.Module, logits: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    """Maps that are turned have as many positions: nothing else would tell."""
    with pytest.raises(OptionError, match=r"pass \(N, K, \*\) with \(N, \*\)"):
        loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
    turned = (logits[0], *logits[2:])
    if len(logits) > 1:
        assert torch.isfinite(loss(torch.zeros(logits), torch.zeros(turned, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_an_epoch_stay_whole_in_a_model_of_lower_precision(dtype: torch.dtype) -> None:
    """bfloat16 counts to 256, float16 to 65504."""
    logits = torch.eye(3)[torch.zeros(300, dtype=torch.int64)] * 4
    labels = torch.zeros(300, dtype=torch.int64)
    loss, low = OnlineLabelSmoothing(3), OnlineLabelSmoothing(3)
    for _ in range(2):
        low.to(dtype)
        low(logits.to(dtype), labels), loss(logits, labels)
    assert low.counts.tolist() == [600.0, 0, 0] and low.counts.dtype == torch.float64
    assert low.soft.dtype == dtype
    loss.next_epoch(), low.next_epoch()
    torch.testing.assert_close(low.soft.float(), loss.soft, rtol=0, atol=4e-3)
    assert OnlineLabelSmoothing(3).to("meta").sums.is_meta
