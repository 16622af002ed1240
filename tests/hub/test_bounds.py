"""What a configuration counts is held to the tensors of its folder before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rewrite.errors import CheckpointError
from rewrite.hub.bounds import check_counts, no_more_parameters
from rewrite.hub.folder import CheckpointFolder, open_folder
from rewrite.hub.structure import structure_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("folder") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def edited(folder: Path, change: dict[str, Any]) -> CheckpointFolder:
    config = json.loads((folder / "config.json").read_text())
    opened = open_folder(folder)
    return CheckpointFolder(**{**vars(opened), "config": {**config, **change}})


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -(10**9)},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**9},
        {"depths": [2, 10**9]},
        {"text_config": {"encoder_layers": 10**9}},
    ],
    ids=str,
)
def test_a_count_that_no_tensor_can_hold_is_refused_by_name(folder: Path, change: Any) -> None:
    key = str(next(iter(change.get("text_config", change))))
    with pytest.raises(CheckpointError, match=rf"{key} = .*more than its 21 tensors can hold"):
        structure_of(edited(folder, change))


@pytest.mark.parametrize(
    "change", [{}, {"num_labels": 300}, {"rope_theta": 10**9}, {"pad_token_id": None}], ids=str
)
def test_what_no_list_is_made_of_may_be_large(folder: Path, change: Any) -> None:
    assert len(structure_of(edited(folder, change)).stored) == 21


def test_a_configuration_that_counts_rightly_is_none_of_its_business(folder: Path) -> None:
    check_counts(open_folder(folder), {"num_hidden_layers": 64, "num_experts": 60_000, "n_x": "a"})


def test_a_class_of_many_more_parameters_is_not_built(folder: Path) -> None:
    opened = open_folder(folder)
    with (
        pytest.raises(CheckpointError, match="more than 1360 parameters"),
        no_more_parameters(opened),
    ):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(10_000))
    assert len(nn.ModuleList(nn.Linear(1, 1) for _ in range(1_000))) == 1_000
