"""The list of classes is what the script makes, and holds what the libraries' networks use."""

from __future__ import annotations

import json

import pytest
from torch import nn

import rewrite
from benchmarks import allowed_classes as script
from rewrite.checkpoint.allowed_classes import Standing, standing
from rewrite.errors import CheckpointError

NETWORKS = (
    *("torchvision:mobilenet_v2", "torchvision:densenet121", "torchvision:regnet_y_400mf"),
    *("torchvision:convnext_tiny", "torchvision:fcos_resnet50_fpn", "torchvision:r3d_18"),
    *("timm:resnet18", "timm:mobilenetv3_small_050", "timm:convnext_atto", "timm:pit_ti_224"),
    *("timm:hrnet_w18_small", "timm:levit_128s", "timm:starnet_s1", "timm:nf_regnet_b0"),
)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_libraries_need_no_trust(name):
    pytest.importorskip(name.partition(":")[0])
    assert list(script.unlisted_in([name])) == []


def test_a_network_that_is_saved_opens(tmp_path):
    model = rewrite.load("torchvision:squeezenet1_1")
    assert type(rewrite.load(rewrite.save(model, tmp_path / "m.pt"))) is type(model)
    block = rewrite.load("torchvision:mobilenet_v2").features[0]
    assert type(rewrite.load(rewrite.save(block, tmp_path / "b.pt"))) is type(block)


def test_the_list_of_a_package_is_what_the_script_makes():
    lists = json.loads(script.CLASSES.read_text())
    roots = {full.rpartition(".")[2] for full in script._flat(lists, "layers")
             if full.startswith("torch.")}  # fmt: skip
    sources = dict(script._sources("torchvision", script.PLACES["torchvision"]))
    layers, _, enums = script._classify(sources, script._MODULES | roots)
    kept = {full for full in script._flat(lists, "layers") if full.startswith("torchvision.")}
    assert layers - enums == kept
    assert "torchvision.ops.misc.Conv2dNormActivation" in kept
    without, _, _ = script._classify(sources, script._MODULES)
    assert "torchvision.ops.misc.Conv2dNormActivation" not in without


def test_what_reads_files_or_fetches_is_on_no_list(tmp_path):
    assert standing("torch.nn.modules.container.Sequential") is Standing.LAYER
    for name in (
        "timm.models._hub.load_custom_from_hf",
        "timm.task.distillation.LogitDistillationTask",
        "torch.jit._script.RecursiveScriptModule",
        "torch.hub.load",
        "rewrite.nn.Missing",
    ):
        assert standing(name) is None
    own = type("Own", (nn.Linear,), {"__module__": "tests.checkpoint.nowhere"})
    with pytest.raises(CheckpointError, match="which no file can refer to by name"):
        rewrite.save(own(2, 2), tmp_path / "own.pt")
