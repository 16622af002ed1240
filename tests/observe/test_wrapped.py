"""Models in wrappers, and with layers that are more than a weight: folded, or declined by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite

from .test_commands import model_of
from .test_transformers import made

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

ONE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


class ScaledIntegers(nn.Module):
    """A layer as GPTQ and bitsandbytes make them: integers, and a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


def reasons(result: Any) -> dict[str, str]:
    return {skip.target.removesuffix(".weight"): skip.reason for skip in result.report.skips}


def test_a_norm_before_a_quantized_layer_stays_and_the_others_fold() -> None:
    model = made("LlamaForCausalLM", **ONE)
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.gate_proj = ScaledIntegers(mlp.gate_proj)  # type: ignore[arg-type]
    result = rewrite.convert(model, "fold")
    assert result.report.ok
    assert {c.target for c in result.report.changes} == {
        "model.layers.0.input_layernorm", "model.norm",
    }  # fmt: skip
    why = reasons(result)["model.layers.0.post_attention_layernorm"]
    assert "model.layers.0.mlp.gate_proj" in why and "computed" in why


class PackedWeight(nn.Parameter):
    """Integers that carry their scale, as bitsandbytes' parameters do: no fake tensor has it."""

    scale: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return packed_weight(self.data.clone(), self.scale)


def packed_weight(integers: Tensor, scale: Tensor) -> PackedWeight:
    held = PackedWeight(integers, requires_grad=False)
    held.scale = scale
    return held


class Packed(nn.Module):
    """A layer of eight bits, from elsewhere; `Linear8bit` is the same from bitsandbytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        integers = (layer.weight.detach() / scale).round().to(torch.int8)
        self.weight, self.bias = packed_weight(integers, scale), None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.weight.scale)


Linear8bit = type("Linear8bit", (Packed,), {"__module__": "bitsandbytes.nn.modules"})


@pytest.mark.parametrize(("kind", "folded"), [(Linear8bit, 2), (Packed, 0)])
def test_a_layer_of_bitsandbytes_is_seen_and_declined_by_name(kind: Any, folded: int) -> None:
    model = made("LlamaForCausalLM", **ONE)
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.gate_proj = kind(mlp.gate_proj)
    result = rewrite.convert(model, "fold")
    assert result.report.ok and len(result.report.changes) == folded
    why = reasons(result)["model.layers.0.post_attention_layernorm"]
    assert ("model.layers.0.mlp.gate_proj" in why) if folded else ("cannot be exported" in why)
    after = result.model.get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(after.weight, PackedWeight)


def test_packed_weights_are_declined_by_the_name_of_the_layer() -> None:
    packed = torch.ao.quantization.quantize_dynamic(
        made("LlamaForCausalLM", **ONE).float(), {nn.Linear}, dtype=torch.qint8
    )
    result = rewrite.convert(packed, "fold", verify=False)
    assert not result.report.changes
    why = reasons(result)["model.norm"]
    assert "self_attn.q_proj is quantized" in why and "fold first" in why


def test_a_compiled_model_folds() -> None:
    compiled = torch.compile(made("LlamaForCausalLM", **ONE), backend="eager")
    result = rewrite.convert(compiled, "fold", verify=False)
    assert len(result.report.changes) == 3
    assert type(result.model) is type(compiled)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before, after = compiled(ids).logits, result.model(ids).logits
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()


def test_lora_folds_into_both_of_its_branches() -> None:
    peft = pytest.importorskip("peft")
    adapted = (
        peft.get_peft_model(
            made("LlamaForCausalLM", **ONE), peft.LoraConfig(target_modules=["q_proj"], r=4)
        )
        .double()
        .eval()
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    result = rewrite.convert(adapted, "fold")
    assert result.report.ok and len(result.report.changes) == 3
    (change,) = (c for c in result.report.changes if c.target.endswith("input_layernorm"))
    assert "q_proj.base_layer" in change.after and "q_proj.lora_A" in change.after


@pytest.mark.parametrize(
    ("kind", "options", "stays"),
    [
        ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "norm"),
        ("LNTuningConfig", {"target_modules": ["input_layernorm"]}, "input_layernorm"),
    ],
)
def test_a_wrapper_that_may_choose_another_module_keeps_the_norm(
    kind: str, options: dict[str, object], stays: str
) -> None:
    """With its adapters disabled it runs the module of before, which no call did."""
    peft = pytest.importorskip("peft")
    model = made("LlamaForCausalLM", **ONE)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(**options)).double().eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or "ln_tuning" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    result = rewrite.convert(adapted, "fold", verify=False)
    assert len(result.report.changes) == 2
    why = [s.reason for s in result.report.skips if stays in s.target.split(".")]
    assert any("which no call ran" in reason for reason in why)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), adapted.disable_adapter(), result.model.disable_adapter():
        before, after = adapted(ids).logits, result.model(ids).logits
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()


def test_a_second_adapter_that_no_call_ran_keeps_the_norm_before_it() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(made("LlamaForCausalLM", **ONE), lora)
    adapted.add_adapter("other", lora)
    adapted = adapted.double().eval()
    result = rewrite.convert(adapted, "fold", verify=False)
    names = [change.target.rpartition(".")[2] for change in result.report.changes]
    assert names == ["post_attention_layernorm", "norm"]
    ids = torch.arange(3, 9)[None]
    for model in (adapted, result.model):
        model.set_adapter("other")
    with torch.no_grad():
        before, after = adapted(ids).logits, result.model(ids).logits
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_model_behind_learned_tokens_says_which_line_keeps_its_norms(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted = peft.get_peft_model(made("LlamaForCausalLM", **ONE), config).double().eval()
    result = rewrite.convert(adapted, "fold", verify=False)
    skips = {skip.target.rpartition(".")[2]: skip.reason for skip in result.report.skips}
    assert {"input_layernorm", "post_attention_layernorm", "norm"} <= skips.keys()
    assert "peft_model.py:" in skips["norm"]


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_model_without_data_is_folded_as_a_plan() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE)).eval()
    report = rewrite.convert(model, "fold").report
    assert len(report.changes) == 3
    assert any(
        "no values (meta device" in note and "nothing was run" in note for note in report.notes
    )


def test_mixed_dtypes_fold_and_keep_them() -> None:
    model = made("LlamaForCausalLM", **ONE).to(torch.bfloat16)
    for name in ("model.norm", "lm_head"):
        model.get_submodule(name).float()
    result = rewrite.convert(model, "fold", verify=False)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: p.dtype for name, p in result.model.named_parameters()} == kinds
    assert len(result.report.changes) == 3


def test_a_call_that_the_model_refuses_says_what_it_said() -> None:
    with pytest.raises(rewrite.RewriteError, match=r"call 1 \(pixels\).*must specify") as caught:
        rewrite.convert(model_of("llama"), "fold", example_calls=[{"pixels": torch.zeros(1, 3)}])
    assert "\n" not in str(caught.value)


class Chooses(nn.Module):
    """Values of the input choose the way: nothing that an export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor, *more: Any, **kwargs: Any) -> Tensor:
        h = self.norm(x)
        if bool(x.sum() > 0):
            h = h * 2
        return self.head(h)


def test_a_model_that_refuses_every_known_call_says_what_it_said() -> None:
    options = {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}
    config = transformers.XGLMConfig(vocab_size=64, max_position_embeddings=32, **options)
    model = transformers.XGLMForCausalLM(config).eval()

    def refuses(*given: object, **named: object) -> None:
        raise ValueError("not today")

    model.model.layers[0].self_attn.forward = refuses
    result = rewrite.convert(model, "fold", verify=False)
    said = "XGLMForCausalLM refuses the calls that are known of it: not today; give example_calls"
    assert said in result.report.notes
    assert said in reasons(result)["model.layer_norm"]


def test_a_forward_that_no_export_follows_names_its_line() -> None:
    result = rewrite.convert(Chooses(), "fold", example_inputs=(torch.ones(2, 8),))
    assert not result.report.changes
    notes = " ".join([*result.report.notes, *reasons(result).values()])
    assert "cannot be exported" in notes and "test_wrapped.py:" in notes
    assert "depends on values of tensors" in notes and "u0" not in notes


def test_a_head_that_is_tied_to_what_no_call_ran_is_named() -> None:
    model = made("LlamaForCausalLM", **ONE)
    model.spare = nn.Linear(32, 64, bias=False)
    model.spare.weight = model.lm_head.weight  # type: ignore[union-attr]
    result = rewrite.convert(model, "fold")
    why = reasons(result)["model.norm"]
    assert "spare" in why
