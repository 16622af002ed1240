"""The scoreboard's own column: every trap through this package, and what the judge calls wrong."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from benchmarks import traps
from benchmarks.folders import exact_type_walker, our_swap, ours, subclass_walker, swap_walker
from benchmarks.scoreboard import judge_fold, judge_swap

REFUSED = {
    "shared_conv", "two_norms_one_conv", "tied_convs", "escaping_conv", "linear_norm_square",
    "norm_before_padded_conv", "norm_before_padded_1x1", "without_statistics", "hook_on_conv",
    "hook_on_norm", "pre_hook_on_norm",
}  # fmt: skip
PARTLY = {
    "norm_first": "1 of 3 left", "conv_relu_norm": "1 of 2 left", "train_mode_norm": "1 of 2 left",
    "branching_parent": "2 of 3 left",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", traps.FOLD)
def test_every_trap_is_folded_right_or_refused(name: str) -> None:
    outcome = judge_fold(ours, name)
    assert outcome.verdict == ("refused" if name in REFUSED else "right")
    assert outcome.detail == PARTLY.get(name, "")


@pytest.mark.parametrize("name", traps.SWAP)
def test_every_trap_of_a_swap_is_right(name: str) -> None:
    assert judge_swap(our_swap, name).verdict == "right"


def test_the_judge_knows_a_wrong_fold_from_a_refusal_and_a_crash() -> None:
    def crashes(model: nn.Module, inputs: Any) -> Any:
        raise RuntimeError

    assert judge_fold(exact_type_walker, "conv_relu_norm").verdict == "**wrong**"
    assert judge_fold(subclass_walker, "norm_with_activation").verdict == "**wrong**"
    assert judge_fold(lambda model, inputs: model, "residual").verdict == "refused"
    assert judge_fold(crashes, "residual").verdict == "crashed"
    assert judge_swap(swap_walker, "frozen_norm").detail.endswith("frozen parameters train")
