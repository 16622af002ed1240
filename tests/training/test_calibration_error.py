from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rewrite.errors import OptionError
from rewrite.training import calibration_error, fit_temperature


def test_the_error_by_hand() -> None:
    # Two classes: confidences 0.9, 0.9, 0.6, 0.6; the answers are right, wrong, right, right.
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6], dtype=torch.float64)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    found = calibration_error(logits, torch.tensor([0, 1, 0, 0]), bins=10)
    assert found.accuracy == 0.75
    assert found.error == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6))
    assert [round(share, 6) for share, _, _ in found.bins] == [0.5, 0.5]


def test_the_temperature_that_was_put_in_comes_out() -> None:
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).flatten()
    assert fit_temperature(true * 3, labels) == pytest.approx(3, rel=0.05)
    hot, cold = calibration_error(true * 3, labels), calibration_error(true, labels)
    assert cold.error < 0.02 < 0.1 < hot.error


def test_the_temperature_is_the_minimum() -> None:
    logits, labels = torch.randn(200, 4, dtype=torch.float64), torch.randint(0, 4, (200,))
    labels[:120] = logits[:120].argmax(1)
    best = fit_temperature(logits, labels)
    losses = [float(F.cross_entropy(logits / t, labels)) for t in (best / 1.01, best, best * 1.01)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_bad_input() -> None:
    for logits, labels, reason in (
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "no sample"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "label 3 is out of range"),
        (torch.zeros(2, 3), torch.tensor([0]), r"pass \(N, K\) and \(N,\)"),
    ):
        with pytest.raises(OptionError, match=reason):
            calibration_error(logits, labels)
    with pytest.raises(OptionError, match="0 bins"):
        calibration_error(torch.zeros(2, 3), torch.tensor([0, 1]), bins=0)
