"""Passes whose changes are recipes, on folders: the bits of a conversion in memory, or declined."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import rewrite
from passes import Rebalance, Reinitialize
from rewrite.affine.algebra import Affine, KernelLayout
from rewrite.affine.layers import Layer, Side
from rewrite.affine.plan import Absorption, Edit
from rewrite.errors import OptionError
from rewrite.fold.folder import Move
from rewrite.fold.recipes import FoldRecipe
from rewrite.fold.replay import apply_report
from rewrite.fold.requirements import Requirements
from rewrite.graph.captured import Captured, TensorRef
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.sharded import recipes as module
from tests.sharded.conftest import Make, draw_vectors_, logits, transformers

pytestmark = pytest.mark.filterwarnings("ignore")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def check_same_bits(source: Path, target: Path, pass_: Pass) -> None:
    memory = rewrite.convert(rewrite.load(source), pass_, verify=False).model.state_dict()
    ours = rewrite.load(target).state_dict()
    assert memory.keys() == ours.keys()
    assert [name for name, value in memory.items() if not torch.equal(value, ours[name])] == []


def resnet(folder: Path) -> Path:
    """Write a residual network with norms whose numbers are not fresh."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck",
        num_labels=3, image_size=32,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.normal_(0.7, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_weights_are_drawn_anew(name: str, make: Make) -> None:
    source = make(name, torch.bfloat16)
    target, pass_ = source.with_name("out"), Reinitialize("glorot:normal", seed=3)
    report = rewrite.convert_checkpoint(source, target, pass_)
    assert report.ok and report.verification is not None
    assert "drawn anew" in " ".join(report.notes)
    check_same_bits(source, target, pass_)
    before, after = tensors(source), tensors(target)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= changed
    assert bool(logits(target).isfinite().all())


def test_a_tensor_that_was_not_drawn_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.run_recipes

    def forgetful(given, store, exact=None):  # type: ignore[no-untyped-def]
        real(given, store, exact)
        if exact is not None and given[0].target == "lm_head":
            store.set("lm_head.weight", store.get("lm_head.weight"))

    monkeypatch.setattr(module, "run_recipes", forgetful)
    source = make()
    with pytest.raises(rewrite.ContractError, match=r"lm_head\.weight is not its exact value"):
        rewrite.convert_checkpoint(source, source.with_name("out"), "reinit")


def test_channels_are_equalized(tmp_path: Path) -> None:
    source, target = resnet(tmp_path / "resnet"), tmp_path / "out"
    pass_ = Rebalance(objective="equalize")
    report = rewrite.convert_checkpoint(source, target, pass_)
    assert len(report.changes) >= 4 and report.ok
    assert report.verification is not None and 0 < report.verification.max_rel < 1e-11
    check_same_bits(source, target, pass_)


def test_what_a_forward_decides_is_declined(tmp_path: Path) -> None:
    source = resnet(tmp_path / "resnet")
    report = rewrite.convert_checkpoint(source, tmp_path / "out", Rebalance(objective="path"))
    assert not report.changes and "convert it in memory" in report.skips[0].reason


def test_a_pass_whose_changes_are_no_recipes_for_a_folder_is_refused(tmp_path: Path) -> None:
    source = resnet(tmp_path / "resnet")
    with pytest.raises(OptionError, match="cannot be run tensor by tensor"):
        rewrite.convert_checkpoint(source, tmp_path / "out", "bn-to-gn")
    assert not (tmp_path / "out").exists()


def test_a_fold_whose_bias_the_class_never_adds_is_left_alone(tmp_path: Path) -> None:
    source = resnet(tmp_path / "resnet")
    report = rewrite.convert_checkpoint(source, tmp_path / "out", "fold")
    assert not report.changes and len(report.skips) == 8
    assert all("bias would appear" in skip.reason for skip in report.skips)


@dataclass(frozen=True)
class ScaleValues(Pass):
    """Somebody's own pass: the values of attention times two, what reads them divided by two."""

    name: ClassVar[str] = "scale-values"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL
    inverse: bool = True

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield each attention."""
        for name, child in captured.tree.modules():
            if hasattr(child, "v_proj"):
                yield Site(name, "attention")

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Write the recipe alone: a folder is rewritten by it."""

        def layer(key: str) -> Layer:
            name = f"{site.target}.{key}"
            return Layer(
                name, "kernel", None, name, 0, 0, 0, KernelLayout(1, False),  # type: ignore[arg-type]
                TensorRef(name, "weight"), None, None, None, 0.0,
            )  # fmt: skip

        size = torch.arange(32)
        value, out = layer("v_proj"), layer("o_proj")
        edits = (
            Edit(value, Side.OUTPUT, size[:16], True, False, False),
            Edit(out, Side.INPUT, size // 16 * 8 + size % 8, True, False, self.inverse),
        )
        scale = torch.full((16,), 2.0, dtype=torch.float64)
        recipe = FoldRecipe(
            site.target, Affine(scale, torch.zeros_like(scale)), Requirements(adds=False),
            (Move(Absorption(edits), "scale"),),
        )  # fmt: skip
        touched = (value.name, out.name)
        return Change(site.target, "attention", "scaled", touched=touched, recipe=recipe.to_data())


def test_a_pass_that_anyone_wrote_runs_by_its_recipes(make: Make) -> None:
    source = make()
    target = source.with_name("out")
    report = rewrite.convert_checkpoint(source, target, ScaleValues())
    assert len(report.changes) == 2 and report.ok
    before, after = tensors(source), tensors(target)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(after[name], 2 * before[name])
    a, b = logits(source), logits(target)
    assert float((a - b).abs().max() / a.abs().max()) < 1e-12
    # The negative twin: what does not divide is found in its blocks.
    with pytest.raises(rewrite.ContractError, match=r"model\.layers\.0 is off"):
        rewrite.convert_checkpoint(source, source.with_name("wrong"), ScaleValues(inverse=False))
    assert not source.with_name("wrong").exists()


def test_the_report_of_a_folder_repeats_what_the_folder_holds(tmp_path: Path) -> None:
    """A plain LayerNorm goes without its weight in memory; in a folder it keeps ones, and zeros."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    draw_vectors_(model)
    source, out = tmp_path / "in", tmp_path / "out"
    model.save_pretrained(source)
    report = rewrite.convert_checkpoint(source, out, "fold", verify=False)
    norms = [change.target for change in report.changes]
    assert len(norms) == 2 and all(not change.keys for change in report.changes)
    assert all("keeps values that do nothing" in change.note for change in report.changes)
    told = json.loads(report.to_json())
    repeated = apply_report(told, load_file(source / "model.safetensors"))
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(repeated[name], tensor) for name, tensor in written.items())
    assert all(bool((written[f"{name}.weight"] == 1).all()) for name in norms)
    memory = rewrite.convert(model, "fold", verify=False)  # the twin: there the weights go
    assert set(memory.report.changes[0].keys.values()) == {None}
