"""The configuration under which a class holds a result: found, or the site is left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rewrite
from passes import FoldNorm, LayerNormToRMSNorm, RemoveWeightNorm, WeightNorm
from rewrite.cli.main import main
from tests.sharded.conftest import Make, draw_vectors_, logits, relative, transformers

pytestmark = pytest.mark.filterwarnings("ignore")


def vision(folder: Path) -> Path:
    """Write a vision tower whose configuration says what its norms are."""
    torch.manual_seed(0)
    config = transformers.InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=[16, 16], patch_size=[4, 4], use_mean_pooling=False, norm_type="layer_norm",
    )  # fmt: skip
    model = transformers.InternVLVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.2)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def hidden(folder: Path) -> torch.Tensor:
    model = transformers.InternVLVisionModel.from_pretrained(folder, dtype=torch.float64).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    with torch.inference_mode():
        out: torch.Tensor = model(pixels).last_hidden_state
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_layer_norms_become_rms_norms_where_the_configuration_can_say_so(tmp_path: Path) -> None:
    source = vision(tmp_path / "vision")
    out = tmp_path / "out"
    report = rewrite.convert_checkpoint(source, out, [FoldNorm(), LayerNormToRMSNorm()])
    assert report.ok and report.verification is not None and report.verification.max_rel < 1e-11
    assert [len(part.changes) > 0 for part in report.passes] == [True, True]
    assert json.loads((out / "config.json").read_text())["norm_type"] == "rms_norm"
    # The last norm is a LayerNorm whatever the configuration says, and keeps its bias.
    gone = tensors(source).keys() - tensors(out).keys()
    assert gone == {
        f"encoder.layer.{n}.layernorm_{k}.bias" for n in (0, 1) for k in ("before", "after")
    }
    before, after = hidden(source), hidden(out)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(out).keys()


def test_a_bias_that_is_not_zero_is_asked_of_the_shards(tmp_path: Path) -> None:
    source = vision(tmp_path / "vision")
    report = rewrite.convert_checkpoint(source, tmp_path / "out", "ln-to-rms")
    assert not report.changes and "bias is not zero" in report.skips[0].reason
    assert "fold it first" in report.skips[0].reason and not (tmp_path / "out").exists()


def test_a_class_that_holds_no_rms_norm_keeps_the_rest_of_a_conversion(make: Make) -> None:
    source = make("gpt-neox")
    report = rewrite.convert_checkpoint(source, source.with_name("out"), ["fold", "ln-to-rms"])
    assert report.passes[0].changes and not report.passes[1].changes
    assert "no configuration of GPTNeoXForCausalLM" in report.passes[1].skips[0].reason


def test_tensors_that_no_configuration_holds_are_left_alone(make: Make, capsys: object) -> None:
    source = make()
    report = rewrite.convert_checkpoint(source, source.with_name("out"), WeightNorm())
    assert not report.changes and not source.with_name("out").exists()
    (reason,) = {skip.reason.partition(" ")[2] for skip in report.skips if "appear" in skip.reason}
    assert reason == "would appear, which no configuration of LlamaForCausalLM holds"
    assert main(["convert", "--weight-norm", str(source)]) == 3


def test_a_weight_norm_that_a_class_cannot_do_without_stays(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "speech")
    report = rewrite.convert_checkpoint(tmp_path / "speech", tmp_path / "out", RemoveWeightNorm())
    assert not report.changes and len(report.skips) == 1
    said = "would appear, which no configuration of Wav2Vec2Model holds"
    assert said in report.skips[0].reason


class NormedConfig(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
    """Says whether the weight of its layer is normed."""

    model_type = "normed"

    def __init__(self, use_weight_norm: bool = True, **rest: object) -> None:
        super().__init__(**rest)
        self.use_weight_norm = use_weight_norm
        self.vocab_size = 16


class NormedModel(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
    """A layer whose weight is normed where its configuration says so."""

    config_class = NormedConfig
    main_input_name = "input_ids"

    def __init__(self, config: NormedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        if config.use_weight_norm:
            nn.utils.parametrizations.weight_norm(self.blocks[0])
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.blocks[0](self.embed(input_ids)),)


@pytest.mark.parametrize("add", [False, True])
def test_weight_norms_go_and_come_where_a_configuration_says_so(
    add: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers puts another module in its place when some of its models are imported.
    monkeypatch.setattr(sys.modules["transformers"], "NormedModel", NormedModel, raising=False)
    torch.manual_seed(0)
    model = NormedModel(NormedConfig(use_weight_norm=not add))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(1.5 if name.endswith("original0") else 1.0)
    source, out = tmp_path / "normed", tmp_path / "out"
    model.save_pretrained(source)
    pass_ = WeightNorm(kinds="linear") if add else RemoveWeightNorm()
    report = rewrite.convert_checkpoint(source, out, pass_)
    assert len(report.changes) == 1 and report.ok and report.verification is not None
    assert json.loads((out / "config.json").read_text())["use_weight_norm"] is add
    memory = rewrite.convert(model.eval(), pass_, verify=False).model.state_dict()
    written = tensors(out)
    assert written.keys() == memory.keys()
    assert all(torch.equal(written[name], value) for name, value in memory.items())


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}  # fmt: skip


def saved(kind: str, folder: Path, **options: object) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    draw_vectors_(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_biases_of_zeros_appear_where_a_class_has_them_all_or_none(tmp_path: Path) -> None:
    """Nemotron's shifts go into queries, keys and values; its output then has a bias as well."""
    source, out = saved("Nemotron", tmp_path / "in"), tmp_path / "out"
    report = rewrite.convert_checkpoint(source, out, "fold")
    assert report.ok and report.verification is not None and report.verification.max_rel < 1e-11
    assert [skip.target for skip in report.skips] == ["model.norm"]  # no head has a bias
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] and config["mlp_bias"]
    new = {n: t for n, t in tensors(out).items() if n not in tensors(source)}
    zeros = {n for n, t in new.items() if not t.any()}
    assert zeros == {f"model.layers.0.{n}.bias" for n in ("self_attn.o_proj", "mlp.down_proj")}
    assert len(new) == 6 and any("biases of zeros" in note for note in report.notes)
    assert error_of(source, out) < 1e-5


def test_a_switch_that_changes_more_than_biases_is_not_turned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative twin: the same switch, in a class whose projections are others then."""
    from transformers.models.nemotron import modeling_nemotron as nemotron

    class Other(nn.Linear):
        pass

    plain = nemotron.NemotronMLP.__init__

    def init(self: nn.Module, config: object) -> None:
        plain(self, config)
        if config.mlp_bias:  # type: ignore[attr-defined]  # of Nemotron
            self.down_proj = Other(48, 32)

    monkeypatch.setattr(nemotron.NemotronMLP, "__init__", init)
    source = saved("Nemotron", tmp_path / "in")
    report = rewrite.convert_checkpoint(source, tmp_path / "out", "fold", verify=False)
    assert [c.target for c in report.changes] == ["model.layers.0.input_layernorm"]
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["mlp_bias"]


def test_a_bias_is_asked_for_by_whatever_key_has_it(tmp_path: Path) -> None:
    source, out = saved("StableLm", tmp_path / "in"), tmp_path / "out"
    report = rewrite.convert_checkpoint(source, out, "fold", verify=False)
    assert "model.layers.0.input_layernorm" in [change.target for change in report.changes]
    assert json.loads((out / "config.json").read_text())["use_qkv_bias"]
    assert error_of(source, out) < 1e-5


def test_layers_that_write_their_product_themselves_get_biases_of_zeros(tmp_path: Path) -> None:
    """Falcon's `bias` gives one to each of its layers, which are of a class of its own."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.FalconForCausalLM(config)
    draw_vectors_(model)
    source, out = tmp_path / "in", tmp_path / "out"
    model.save_pretrained(source)
    report = rewrite.convert_checkpoint(source, out, "fold", verify=False)
    assert [change.target for change in report.changes] == ["transformer.h.0.input_layernorm"]
    assert json.loads((out / "config.json").read_text())["bias"]
    assert error_of(source, out) < 1e-5


def test_a_head_whose_bias_is_tied_with_it_is_not_untied(tmp_path: Path) -> None:
    """BERT's configuration unties weight and bias of the decoder, or neither."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    source = tmp_path / "in"
    model.save_pretrained(source)
    report = rewrite.convert_checkpoint(source, tmp_path / "out", "fold{untie=true}", verify=False)
    assert [c.target for c in report.changes] == ["bert.encoder.layer.0.output.LayerNorm"]
    why = {skip.target: skip.reason for skip in report.skips}
    assert "would be its own" in why["cls.predictions.transform.LayerNorm"]


def error_of(source: Path, out: Path) -> float:
    expected, got = logits(source), logits(out)
    return float((expected - got).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_head_that_its_class_ties_in_any_case_is_left_alone(tmp_path: Path, tied: bool) -> None:
    # T5's ties it whatever its configuration says, and scales what the head reads by that.
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source)
    report = rewrite.convert_checkpoint(source, target, FoldNorm(untie=True), verify=False)
    reasons = {skip.target: skip.reason for skip in report.skips}
    assert len(report.changes) == 5  # twice attention, the other one, and both feed-forward parts
    assert reasons["decoder.final_layer_norm"].startswith("lm_head.weight would be its own, which")
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] == json.loads(
        (source / "config.json").read_text()
    ).get("tie_word_embeddings", True)
    ids = torch.arange(6)[None]
    outputs = []
    for folder in (source, target):
        opened = transformers.T5ForConditionalGeneration.from_pretrained(folder).double().eval()
        with torch.inference_mode():
            outputs.append(opened(input_ids=ids, decoder_input_ids=ids).logits)
    assert relative(*outputs) < 1e-5
