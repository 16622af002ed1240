"""A folder in, a folder out: opened by transformers itself, equal, whole, and proved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rewrite
from passes import FoldNorm
from rewrite.cli.main import main
from rewrite.sharded import recipes as module
from rewrite.sharded.writer import FolderWriter
from tests.sharded.conftest import FAMILIES, LLAMA, Make, logits, relative, transformers

pytestmark = pytest.mark.filterwarnings("ignore")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


# The others differ from these in what the fold of a model in memory shows (tests/observe).
SEVERAL_KINDS = ("llama", "mixtral", "gpt-neox")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SEVERAL_KINDS else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_the_result_is_opened_by_transformers_and_equal(name: str, make: Make) -> None:
    source = make(name)
    report = rewrite.convert_checkpoint(source, source.with_name("out"), "fold")
    assert report.changes and report.ok
    assert report.verification is not None and report.verification.max_rel < 1e-11
    # float32 weights are rounded once: what is left is their rounding.
    assert relative(logits(source), logits(source.with_name("out"))) < 1e-5


def test_folded_norms_hold_ones(make: Make) -> None:
    source = make()
    rewrite.convert_checkpoint(source, source.with_name("out"), "fold")
    norms = {k: v for k, v in tensors(source.with_name("out")).items() if "norm" in k}
    assert norms and all(bool((v == 1).all()) for v in norms.values())


def test_it_is_bit_identical_to_the_road_in_memory(make: Make) -> None:
    source = make("llama", torch.bfloat16)
    rewrite.convert_checkpoint(source, source.with_name("out"), "fold", verify=False)
    model = rewrite.load(source)
    folded = rewrite.convert(model, "fold", verify=False).model.state_dict()
    written = tensors(source.with_name("out"))
    assert set(written) == set(folded)
    assert all(torch.equal(written[k], v) for k, v in folded.items())


def test_experts_stay_one_by_one_and_are_the_same_bits_as_in_memory(make: Make) -> None:
    source = make("mixtral", torch.bfloat16)
    rewrite.convert_checkpoint(source, source.with_name("out"), "fold", verify=False)
    before, after = tensors(source), tensors(source.with_name("out"))
    assert set(before) == set(after)
    experts = [name for name in before if ".experts." in name and ".w1." in name]
    assert len(experts) == 6 and not any(torch.equal(before[n], after[n]) for n in experts)
    ours = rewrite.load(source.with_name("out")).state_dict()
    folded = rewrite.convert(rewrite.load(source), "fold", verify=False).model.state_dict()
    assert set(folded) == set(ours)
    assert all(torch.equal(ours[k], v) for k, v in folded.items())


def test_shards_keep_their_names_and_everything_else_is_copied(make: Make) -> None:
    source = make()
    rewrite.convert_checkpoint(source, source.with_name("out"), "fold", verify=False)
    names = {path.name for path in source.iterdir()}
    assert len(names) > 4 and {p.name for p in source.with_name("out").iterdir()} == names


def test_a_tied_head_is_left_alone_or_gets_its_own_weight(make: Make) -> None:
    source = make("llama-tied")
    kept = rewrite.convert_checkpoint(source, source.with_name("kept"), "fold", verify=False)
    assert [skip.target for skip in kept.skips] == ["model.norm"]
    untied = rewrite.convert_checkpoint(source, source.with_name("own"), FoldNorm(untie=True))
    assert not untied.skips and untied.ok
    config = json.loads((source.with_name("own") / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors(source.with_name("own"))
    assert relative(logits(source), logits(source.with_name("own"))) < 1e-5


def test_a_wrong_tensor_is_found_and_nothing_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FolderWriter.write

    def off(writer: FolderWriter, name: str, content: memoryview, begin: int) -> None:
        if name.endswith("layers.1.mlp.up_proj.weight") and begin == 0:
            number = torch.frombuffer(bytearray(content[:4]), dtype=torch.float32)
            content = memoryview(bytes((number + 1e-3).numpy()) + content[4:])
        real(writer, name, content, begin)

    monkeypatch.setattr(FolderWriter, "write", off)
    source = make()
    with pytest.raises(rewrite.ContractError, match=r"layers\.1\.mlp\.up_proj\.weight is not"):
        rewrite.convert_checkpoint(source, source.with_name("out"), "fold")
    assert not source.with_name("out").exists() and left_behind(source) == []


def test_a_wrong_recipe_is_found_in_its_block(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.run_recipes

    def wrong(recipes: Any, store: Any, exact: Any) -> None:
        (recipe,) = recipes
        if "layers.1.post_attention" in recipe.weight:
            recipe = replace(recipe, factor=recipe.factor * 1.001)
        real([recipe], store, exact)

    monkeypatch.setattr(module, "run_recipes", wrong)
    source = make()
    with pytest.raises(rewrite.ContractError, match=r"model\.layers\.1 is off") as caught:
        rewrite.convert_checkpoint(source, source.with_name("out"), "fold")
    cases = caught.value.result.report.verification.cases
    assert [case.name for case in cases if case.failed] == ["model.layers.1", "output"]


def test_nothing_to_fold_writes_nothing(make: Make) -> None:
    source = make()
    report = rewrite.convert_checkpoint(source, source.with_name("out"), "fold", only=["nothing"])
    assert not report.changes and not source.with_name("out").exists()


def broken_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def twice_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    text = path.read_text().replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x",')
    path.write_text(text)


def configured(**values: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def quantized_tensor(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for name in held:
            if name.endswith("q_proj.weight"):
                held[name] = held[name].to(torch.float8_e4m3fn)
        save_file(held, file)


def cut_off(folder: Path) -> None:
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: next(iter(f.glob("*-00002-*.safetensors"))).unlink(), "is missing"),
        (broken_index, "which the index does not name there"),
        (twice_in_index, "names model.norm.weight twice"),
        (configured(hidden_size=64, head_dim=8), "has shape"),
        (configured(auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (configured(quantization_config={"quant_method": "gptq"}), "quantized (gptq)"),
        (configured(architectures=["Evil"]), "Evil is no model class of transformers"),
        (configured(num_hidden_layers=3), "has no tensor model.layers.2"),
        (quantized_tensor, "F8_E4M3"),
        (cut_off, "header says"),
        (lambda f: (f / "config.json").unlink(), "without a config.json"),
        (lambda f: (f / "model.gguf").touch(), "GGUF"),
    ],
)
def test_a_folder_that_is_not_right_is_one_line(
    spoil: Any, said: str, make: Make, capsys: Any
) -> None:
    source = make()
    spoil(source)
    before = sorted(path.name for path in source.parent.iterdir())
    capsys.readouterr()
    assert main(["convert", "--fold", str(source)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(path.name for path in source.parent.iterdir()) == before


def test_a_forward_that_asks_for_the_type_of_a_weight_is_planned_on_that_of_the_folder(
    tmp_path: Path,
) -> None:
    """Hunyuan's router widens its input if its weight is float32: a line that bfloat16 skips."""
    config = transformers.HunYuanMoEV1Config(
        **{**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": False}, num_experts=2,
        moe_topk=1, head_dim=8, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.HunYuanMoEV1ForCausalLM(config).to(torch.bfloat16)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.data.normal_(0.8, 0.3)
    model.save_pretrained(tmp_path / "source")
    report = rewrite.convert_checkpoint(tmp_path / "source", tmp_path / "out", "fold", verify=False)
    memory = rewrite.convert(rewrite.load(tmp_path / "source"), "fold", verify=False)
    assert [c.target for c in report.changes] == [c.target for c in memory.report.changes]
    ours, theirs = rewrite.load(tmp_path / "out").state_dict(), memory.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
