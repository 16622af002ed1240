"""The list of classes beside what was seen of them: built and run under Python's audit hooks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import seen_classes as script
from benchmarks.seen_classes import Watch, full_name, seen_in
from rewrite.checkpoint.allowed_classes import Standing, standing

SEEN = json.loads(script.DATA.read_text())["classes"]


class Quiet(nn.Module):
    """A layer that computes."""

    def forward(self, x):
        return x + 1


class Reads(Quiet):
    """A layer that opens a file when it is called."""

    def forward(self, x):
        with Path(__file__).open("rb") as stream:
            stream.read(1)
        return super().forward(x)


class Evaluates(Quiet):
    """A layer that evaluates text when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.one = eval("1")


class Imports(Quiet):
    """A layer that imports a module of the standard library: no act of its own."""

    def forward(self, x):
        import colorsys

        return x * colorsys.ONE_THIRD


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def heard(watch: Watch, kind: type[nn.Module]) -> set[str]:
    watch.did.clear()
    with watch.on():
        kind()(torch.ones(1))
    return watch.did.get(full_name(kind), set())


@pytest.mark.parametrize(
    ("kind", "events"),
    [(Quiet, set()), (Reads, {"open"}), (Evaluates, {"compile", "exec"}), (Imports, set())],
)
def test_what_a_layer_does_is_heard(watch, kind, events) -> None:
    assert heard(watch, kind) == events
    watch.did.clear()
    kind()(torch.ones(1))
    assert not watch.did, "outside of a watch nothing is counted"


BY_NAME = {
    "transformers.models.edgetam_video.modeling_edgetam_video.EdgeTamVideoModel",
    "transformers.models.sam2.modeling_sam2.Sam2VisionModel",
    "transformers.models.timm_backbone.modeling_timm_backbone.TimmBackbone",
}
"""Classes whose construction asks a library for a model by its name, which may be downloaded."""


def test_every_class_that_was_seen_is_listed_but_those_that_build_by_name() -> None:
    listed = (Standing.LAYER, Standing.INSTANCE)
    assert {full for full in SEEN if standing(full) not in listed} == BY_NAME & set(SEEN)
    assert not any(standing(full) for full in BY_NAME)


def test_no_listed_class_acted_while_it_was_built_or_run() -> None:
    assert {full: entry["did"] for full, entry in SEEN.items() if entry["did"]} == {}


def test_most_classes_that_were_built_were_run_as_well() -> None:
    """A container of layers is never called; the others are, but for heads of training."""
    ran = sum(entry["ran"] for entry in SEEN.values())
    assert ran > 0.75 * len(SEEN)
    assert SEEN["torch.nn.modules.conv.Conv2d"]["ran"]
    assert not SEEN["torch.nn.modules.container.ModuleList"]["ran"]


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "torchvision:mobilenet_v2"])
def test_the_script_sees_what_the_data_say(watch, name) -> None:
    watch.did.clear()
    built, ran = seen_in(name, watch)
    assert built <= set(SEEN)
    assert {full for full in built if SEEN[full]["ran"]} >= ran & built
    assert not watch.did
    assert len(ran & built) > 4
