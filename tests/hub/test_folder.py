"""Forms of a checkpoint folder: what transformers opens is what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rewrite
from rewrite.cli.main import main
from rewrite.errors import CheckpointError
from rewrite.hub.folder import open_folder, other_weights
from tests.sharded.conftest import Make, logits, maker

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return maker(tmp_path)


def tensors(folder: Path) -> Tensors:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the tensors of a folder, which holds them in one file then."""
    held = change(tensors(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configured(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def with_head(off: float) -> Callable[[Tensors], Tensors]:
    def change(held: Tensors) -> Tensors:
        return {**held, HEAD: held[EMBEDDING] + off * torch.randn_like(held[EMBEDDING])}

    return change


def neutral(held: Tensors) -> Tensors:
    return {k: torch.ones_like(v) if "norm" in k else v for k, v in held.items()}


def error(folder: Path, other: Path) -> float:
    expected, got = logits(folder), logits(other)
    return float((expected - got).abs().max() / expected.abs().max())


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_a_head_that_is_tied_and_held_as_well_turns_with_its_embedding(
    make: Make, off: float
) -> None:
    """What is equal is one tensor; what differs transformers loads as two, and so it is here."""
    source = rewritten(make("llama-tied"), lambda held: with_head(off)(neutral(held)))
    out = source.with_name("out")
    report = rewrite.convert_checkpoint(source, out, "rotate-stream")
    assert len(report.changes) == 1
    assert error(source, out) < 1e-5
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (off == 0)
    assert (HEAD in tensors(out)) is (off != 0)
    assert not torch.equal(tensors(out)[EMBEDDING], tensors(source)[EMBEDDING])


def test_a_head_that_is_held_as_well_is_left_where_nothing_of_it_changes(make: Make) -> None:
    source = rewritten(make("llama-tied"), with_head(0.0))
    out = source.with_name("out")
    report = rewrite.convert_checkpoint(source, out, "fold", verify=False)
    assert [skip.target for skip in report.skips] == ["model.norm"]
    assert torch.equal(tensors(out)[HEAD], tensors(source)[HEAD])


def test_untying_a_head_that_is_held_as_well_says_so_in_the_configuration(make: Make) -> None:
    source = rewritten(make("llama-tied"), with_head(0.0))
    out = source.with_name("out")
    rewrite.convert_checkpoint(source, out, "fold{untie=true}", verify=False)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(tensors(out)[HEAD], tensors(out)[EMBEDDING])
    assert error(source, out) < 1e-5


def test_a_head_that_differs_is_loaded_as_one_of_its_own(make: Make) -> None:
    model = rewrite.load(rewritten(make("llama-tied"), with_head(0.1)))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model = rewrite.load(rewritten(make("llama-tied"), with_head(0.0)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaModel"])
def test_the_prefix_of_the_base_model_may_be_there_or_not(make: Make, kind: str) -> None:
    """As the folders of GPT-2 have it: saved from the base model, opened with the head, or so."""
    source = make("llama-tied")
    if kind == "LlamaForCausalLM":
        rewritten(source, lambda held: {k.removeprefix("model."): v for k, v in held.items()})
    configured(source, architectures=[kind])
    names = tensors(source).keys()
    out = source.with_name("out")
    assert len(rewrite.convert_checkpoint(source, out, "fold", verify=False).changes) == 4
    assert tensors(out).keys() == names
    configured(out, architectures=["LlamaForCausalLM"])
    if kind == "LlamaForCausalLM":
        assert error(source, out) < 1e-5


def test_one_file_is_opened_before_an_index(make: Make) -> None:
    """So does transformers; the shards beside it are other weights, and the report says so."""
    source = make()
    held = {k: v + 0.1 for k, v in tensors(source).items()}
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    out = source.with_name("out")
    report = rewrite.convert_checkpoint(source, out, "fold", verify=False)
    assert any("with the weights of before: model-00001" in note for note in report.notes)
    assert not torch.equal(
        load_file(out / "model.safetensors")["lm_head.weight"], held["lm_head.weight"]
    )
    assert error(source, out) < 1e-5


def test_only_files_of_weights_are_named(make: Make) -> None:
    source = make()
    for name in ("pytorch_model.bin", "training_args.bin", "README.md"):
        (source / name).write_text("x")
    assert other_weights(open_folder(source)) == ["pytorch_model.bin"]


def test_links_into_a_cache_are_followed(make: Make) -> None:
    """The folders of Hugging Face's cache hold links alone."""
    source = make()
    blobs = source.with_name("blobs")
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    out = source.with_name("out")
    rewrite.convert_checkpoint(source, out, "fold", verify=False)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert error(source, out) < 1e-5


def as_type(dtype: torch.dtype) -> Callable[[Path], Path]:
    """Store the weights of down projections, which no fold reads, in another type."""

    def change(folder: Path) -> Path:
        return rewritten(
            folder, lambda h: {k: v.to(dtype) if "down_proj" in k else v for k, v in h.items()}
        )

    return change


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def packed(folder: Path) -> None:
    configured(folder, text_config={"quantization_config": {"quant_method": "awq"}})


@pytest.mark.parametrize("command", [("convert", "--fold", "--no-verify"), ("inspect",)])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (as_type(torch.int8), "down_proj.weight is of type I8"),
        (as_type(torch.float8_e5m2), "down_proj.weight is of type F8_E5M2"),
        (adapter, "merge the two"),
        (packed, "quantized (awq)"),
        (lambda f: configured(f, transformers_weights="other.safetensors"), "other.safetensors"),
        (lambda f: configured(f, architectures=None), "names no class (architectures)"),
    ],
)
def test_what_transformers_would_open_otherwise_is_refused(
    command: tuple[str, ...],
    spoil: Callable[[Path], None],
    said: str,
    make: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make()
    spoil(source)
    before = sorted(source.parent.rglob("*"))
    capsys.readouterr()
    assert main([*command, str(source)]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert sorted(source.parent.rglob("*")) == before


def test_two_tensors_that_no_configuration_unties_are_refused(tmp_path: Path) -> None:
    """T5's encoder and decoder share an embedding whatever its configuration says."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    source = tmp_path / "t5"
    transformers.T5ForConditionalGeneration(config).save_pretrained(source)
    rewritten(source, lambda h: {**h, "encoder.embed_tokens.weight": h["shared.weight"] + 1})
    with pytest.raises(CheckpointError, match="differ, and T5ForConditionalGeneration holds them"):
        rewrite.load(source)


def test_pickled_weights_alone_are_refused_by_name(make: Make) -> None:
    folder = make()
    held = tensors(folder)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        open_folder(folder)


def test_a_folder_of_links_as_the_cache_of_the_hub_has_it_becomes_one_of_files(make: Make) -> None:
    folder = make()
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    rewrite.convert_checkpoint(folder, folder.with_name("out"), "fold", verify=False)
    made = sorted(folder.with_name("out").iterdir())
    assert [p.name for p in made] == sorted(p.name for p in folder.iterdir())
    assert not any(path.is_symlink() for path in made)
    assert (logits(folder) - logits(folder.with_name("out"))).abs().max() < 1e-5
