"""The sweep itself: it must count right, notice what is wrong, and survive what a model does."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import capture_time, corpus, coverage
from benchmarks.corpus.fill import SkipRandomInit, fill
from benchmarks.sweep import measure, outputs, workers
from benchmarks.sweep.counts import run
from benchmarks.sweep.order import by_family
from benchmarks.sweep.rows import append, complete, read
from benchmarks.sweep.summary import failures, summary
from rewrite.protocol import Applied

# timm's smallest models: 0.5 M parameters, BatchNormAct2d inside.
SMALL = "timm:test_efficientnet"

GOOD = {
    "name": "timm:x", "status": "run", "norms": 5, "run": 5, "seen": 5, "unseen": [], "left": 0,
    "arithmetic": 0, "activations": 4, "activations_after": 4, "finite_before": True,
    "finite": True, "same_shape": True, "skips": {}, "opaque": {}, "fold_diff": 1e-15,
    "capture_seconds": 0.1, "trace_seconds": 0.1, "seconds": 1.0, "fuse_left": 5, "opacus_left": 5,
}  # fmt: skip


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.twice = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.twice(self.twice(self.bn(x))))
        x = F.batch_norm(x, self.bn.running_mean.clone(), self.bn.running_var)
        return torch.sigmoid(x) * F.silu(x).relu_()


class Frozen(nn.Module):
    """A norm by arithmetic, as in torchvision's and transformers' detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean[:, None, None]


def test_norms_and_activations_that_run_are_counted_in_every_spelling():
    counts = run(Counted().eval(), (torch.randn(2, 4, 3, 3),))[1]
    assert (len(counts.norms), counts.norm_calls, counts.activations) == (3, 4, 4)
    assert counts.arithmetic == []


def test_a_norm_by_arithmetic_is_counted_apart():
    counts = run(nn.Sequential(Frozen(), nn.BatchNorm2d(4)).eval(), (torch.randn(2, 4, 3, 3),))[1]
    assert counts.arithmetic == ["0"]
    assert len(counts.norms) == 1


def test_counting_leaves_no_hook_behind():
    model = Counted().eval()
    run(model, (torch.randn(2, 4, 3, 3),))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_outputs_are_compared_through_any_nesting():
    old = {"a": [torch.ones(2, 3), (torch.arange(3),)]}
    assert outputs.relative_difference(old, old) == 0
    new = {"a": [torch.ones(2, 3) * 1.01, (torch.arange(3),)]}
    assert outputs.relative_difference(old, new) == pytest.approx(0.01, rel=1e-4)
    assert outputs.relative_difference(old, {"a": [torch.ones(2, 3)]}) == float("inf")
    assert outputs.relative_difference(torch.ones(1), torch.tensor([float("nan")])) == float("inf")
    assert not outputs.all_finite({"a": (torch.tensor([float("nan")]),)})


def test_boxes_may_differ_in_number_and_in_nothing_else():
    old, new = {"boxes": torch.ones(5, 4)}, {"boxes": torch.ones(2, 4)}
    assert outputs.same_shapes(old, new, free_length=True)
    assert not outputs.same_shapes(old, new, free_length=False)
    assert not outputs.same_shapes(old, {"boxes": torch.ones(2, 3)}, free_length=True)


# -- the corpus -------------------------------------------------------------------------------


def test_every_norm_of_the_corpus_is_far_from_fresh():
    model, example_inputs = corpus.build(SMALL)
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    assert norms
    for norm in norms:
        assert norm.running_mean.std() > 0.05 and norm.running_var.std() > 0.05
        assert norm.weight.std() > 0.05 and norm.bias.std() > 0.05
    assert outputs.all_finite(model(*example_inputs))
    again = corpus.make(SMALL).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_skipped_initializers_leave_computed_values_alone():
    with SkipRandomInit():
        layer = nn.Linear(64, 64)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        norm = nn.LayerNorm(64)
    assert torch.equal(norm.weight, torch.ones(64))
    fill(layer)
    assert layer.weight.detach().std().item() == pytest.approx(1 / 8, rel=0.1)


def test_an_architecture_that_does_not_exist_says_so():
    with pytest.raises(corpus.UnbuildableError, match="no_such_model"):
        corpus.make("timm:no_such_model")
    with pytest.raises(ValueError, match="PACKAGE:ARCHITECTURE"):
        corpus.make("resnet18")


def test_the_order_keeps_every_architecture_and_begins_with_one_a_family():
    names = [f"timm:{name}" for name in ("resnet152", "resnet18", "vgg11_bn", "resnet34", "dla34")]
    ordered = by_family(names)
    assert sorted(ordered) == sorted(names)
    assert ordered[:3] == ["timm:resnet18", "timm:vgg11_bn", "timm:dla34"]
    assert ordered[-1] == "timm:resnet152"


# -- a row ------------------------------------------------------------------------------------


def test_a_row_of_a_real_architecture_reaches_the_target():
    row = measure.measure(SMALL)
    assert row["status"] == "run"
    assert row["run"] == row["seen"] == row["norms"] > 10
    assert row["left"] == 0
    assert row["activations"] == row["activations_after"] > 10
    assert row["fold_diff"] < 1e-12
    assert row["fuse_left"] == row["run"]  # the fuser does not know BatchNormAct2d
    assert failures(row) == []


def test_a_pass_that_does_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(measure, "apply_pass", lambda rewrite, model, *_: Applied(model, (), ()))
    row = measure.measure(SMALL)
    assert row["left"] == row["run"]
    assert any("norms left" in line for line in failures(row))


def test_a_pass_that_loses_activations_is_noticed(monkeypatch):
    def lose(rewrite: Any, model: nn.Module) -> Applied:
        for module in model.modules():
            if isinstance(getattr(module, "act", None), nn.Module):
                module.act = nn.Identity()
        return Applied(model, (), ())

    monkeypatch.setattr(measure, "apply_pass", lose)
    row = measure.measure(SMALL)
    assert row["activations_after"] < row["activations"]
    assert any("activations" in line for line in failures(row))
    assert any("folding is off" in line for line in failures(row))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": 4, "unseen": ["bn"]}, "1 norms that run not seen"),
        ({"left": 2}, "2 of 5 norms left"),
        ({"activations_after": 3}, "activations 4 -> 3"),
        ({"finite": False}, "not finite"),
        ({"same_shape": False}, "another shape"),
        ({"fold_diff": 1e-3}, "folding is off"),
        ({"swap_error": "PassError: x"}, "bn-to-gn: PassError: x"),
        ({"fold_error": "PassError: x"}, "fold: PassError: x"),
        ({"status": "timeout", "error": "more than 1 s"}, "timeout: more than 1 s"),
    ],
)
def test_each_way_to_miss_the_target_is_named(change: dict[str, Any], message: str):
    assert failures(GOOD) == []
    (line,) = failures(GOOD | change)
    assert message in line


def test_a_difference_of_the_size_of_rounding_is_no_failure():
    assert failures(GOOD | {"fold_diff": 1e-7, "rounding": 1e-8}) == []
    assert failures(GOOD | {"fold_diff": 1e-3, "rounding": 1e-8})


def test_the_page_names_failures_and_what_cannot_be_built():
    rows = [
        GOOD,
        GOOD | {"name": "timm:y", "left": 2, "skips": {"has a hook": 2}},
        {"name": "timm:z", "status": "unbuildable", "error": "ImportError: no such thing"},
    ]
    page = summary(rows, 9)
    assert "3 of 9 architectures have a row" in page
    assert "| timm | 3 | 2 | 0 | 0 | 1 | 0 | 10 | 10 | 2 | 1 of 2 | 0 |" in page
    assert "- timm:y: 2 of 5 norms left: has a hook" in page
    assert "ImportError: no such thing (timm:z)" in page


def test_packages_that_are_not_installed_are_said_and_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(coverage, "installed", lambda name: not name.startswith("timm:"))
    assert coverage.main([SMALL, "--results", str(tmp_path / "rows.jsonl")]) == 0
    assert f"not installed: {SMALL}" in capsys.readouterr().err


# -- processes --------------------------------------------------------------------------------


def misbehave(name: str) -> dict[str, Any]:
    if name == "sleeps":
        time.sleep(60)
    if name == "grows":
        bytearray(4_000_000_000)
    if name == "crashes":
        os._exit(7)
    if name == "raises":
        raise RuntimeError("what it says")
    return {"name": name, "status": "run"}


def test_a_process_that_misbehaves_is_a_row_and_the_rest_goes_on():
    names = ["sleeps", "good", "grows", "crashes", "raises", "also good"]
    limits = workers.Limits(seconds=3, megabytes=1000)
    rows = {row["name"]: row for row in workers.run_all(names, misbehave, limits, 2)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "sleeps": "timeout", "good": "run", "grows": "memory", "crashes": "crashed",
        "raises": "failed", "also good": "run",
    }  # fmt: skip
    assert rows["raises"]["error"] == "RuntimeError: what it says"


def test_the_last_row_of_a_name_counts_at_the_place_of_the_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read(path) == []
    for name, left in (("a", 1), ("b", 2), ("a", 3)):
        append(path, {"name": name, "left": left})
    assert read(path) == [{"name": "a", "left": 3}, {"name": "b", "left": 2}]


@pytest.mark.parametrize("said", ["×", "one\u2028line", "two\nlines\r", "half a pair: \udc80"])
def test_a_row_is_one_line_whatever_an_error_says(said, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"name": name, "error": said} for name in "ab"]
    for row in rows:
        append(path, row)
    assert path.read_bytes().count(b"\n") == 2
    assert read(path) == rows


def test_a_sweep_is_resumed_where_it_stopped(tmp_path, capsys):
    results = tmp_path / "rows.jsonl"
    results.write_text(json.dumps(GOOD | {"name": SMALL, "left": 1}) + "\n", encoding="utf-8")
    # The row is there already, so the architecture is not run again, and its failure is reported.
    assert coverage.main([SMALL, "--results", str(results)]) == 1
    assert len(results.read_text().splitlines()) == 1
    assert "1 of 5 norms left" in capsys.readouterr().out


def test_brief_rows_are_completed_by_the_peers_alone_and_then_in_full(tmp_path, capsys):
    results = tmp_path / "rows.jsonl"
    arguments = [SMALL, "--results", str(results)]
    rows = []
    for level in (["--brief"], ["--brief"], ["--peers"], ["--peers"], []):
        assert coverage.main([*arguments, *level]) == 0
        rows.append(read(results)[-1])
    assert len(results.read_text().splitlines()) == 3
    assert "fuse_left" not in rows[1] and "fold_left" not in rows[1]
    peers = {key: value for key, value in rows[3].items() if key.startswith(("fuse_", "opacus_"))}
    assert "fuse_left" in peers and rows[3] == rows[1] | peers
    assert rows[4]["fold_left"] == 0 and "brief" not in rows[4]


def test_a_peer_that_crashes_takes_nothing_from_a_row(tmp_path, monkeypatch):
    results = tmp_path / "rows.jsonl"
    brief = GOOD | {"name": SMALL, "brief": True, "parameters": 1}
    del brief["fuse_left"], brief["opacus_left"]
    results.write_text(json.dumps(brief) + "\n", encoding="utf-8")
    monkeypatch.setattr(coverage, "with_peers", lambda row: os._exit(7))
    assert coverage.main([SMALL, "--peers", "--results", str(results)]) == 0
    (row,) = read(results)
    assert row["status"] == "run" and row["fuse_error"] == "crashed: exit code 7"


# -- time -------------------------------------------------------------------------------------


def test_the_number_of_regions_grows_with_the_blocks_and_no_faster():
    (_, four, _), (_, forty, _) = capture_time.growth(1, sizes=(4, 40))
    assert (four, forty) == (5, 41)


def test_what_has_a_row_is_not_measured_again(tmp_path):
    place, measured = tmp_path / "rows.jsonl", []

    def measure(name):
        measured.append(name)
        return {"name": name}

    complete(place, ["a", "b"], measure)
    complete(place, ["a", "b", "c"], measure)
    assert measured == ["a", "b", "c"]
    assert [row["name"] for row in read(place)] == measured
