"""Folding norms of transformers with other tools: right, wrong, or crashed, on the same models.

    error = max |f(x) - g(x)| / max |f(x)|     logits of one prefill, both in float64

A tool is right below 1e-4 (one multiplies in float32), and wrong above. The models are those of
`transformer_folds`: tiny, random, every 1-D parameter drawn anew, with heads of their own. Folded
are norms that became neutral: weights of ones, or of zeros where the class adds one.

    python -m benchmarks.transformer_peers --out peers.jsonl --write

Each family and tool is a process of its own, with a limit of time and memory, and a line of JSON;
what has one is not run again. A tool that cannot be imported is named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rewrite
from benchmarks._table import environment, table, write_section
from benchmarks.sweep.rows import Row, append, read
from benchmarks.sweep.workers import Limits, run_all
from benchmarks.transformer_families import families, made

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
WRONG = 1e-4
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi",
    "stablelm", "starcoder2", "granite", "olmo2", "glm4", "cohere", "nemotron", "smollm3", "gpt2",
    "gpt_neox", "opt", "bloom", "falcon", "mixtral", "deepseek_v3",
)  # fmt: skip
Fold = Callable[[nn.Module, Tensor], nn.Module]


def ours(model: nn.Module, ids: Tensor) -> nn.Module:
    """Fold with this toolkit."""
    return rewrite.convert(model, "fold", verify=False).model


def llm_compressor(model: nn.Module, ids: Tensor) -> nn.Module:
    """Fold as SpinQuant's modifier does, by the mapping that the tool infers from the class."""
    fuse = _attribute("llmcompressor.modeling.fuse", "fuse_norm_linears")
    package = "llmcompressor.modifiers.transform.spinquant.norm_mappings"
    infer = _attribute(package, "infer_norm_mapping_from_model")
    match = _attribute("compressed_tensors.utils", "match_modules_set")
    for mapping in infer(model):
        for norm, *linears in match(model, (mapping.norm, *mapping.linears)):
            fuse(norm[0], tree_leaves(linears))
    return model


def transformer_tricks(model: nn.Module, ids: Tensor) -> nn.Module:
    """Fold the state dict by FlashNorm."""
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    _attribute("transformer_tricks", "flashify")(parameters, model.config, False)
    model.load_state_dict(parameters)
    return model


def transformer_lens(model: nn.Module, ids: Tensor) -> nn.Module:
    """Fold by `fold_ln`, without the centring that compatibility mode does by default."""
    bridge = _attribute("transformer_lens.model_bridge", "TransformerBridge")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]  # of transformers
        found = bridge.boot_transformers(
            folder, hf_model=model, device="cpu", dtype=torch.float64, tokenizer=_tokenizer(folder)
        )
    found.enable_compatibility_mode(
        fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        disable_warnings=True,
    )  # fmt: skip
    folded: nn.Module = found
    return folded


def brevitas(model: nn.Module, ids: Tensor) -> nn.Module:
    """Fold the graph of an export, as its entry point for language models does."""
    package = "brevitas_examples.llm.llm_quant.ln_affine_merge"
    merge = _attribute(package, "apply_layernorm_affine_merge")
    patch = _attribute(package, "rmsnorm_patch")
    exporting = _attribute("brevitas_examples.common.dynamo_utils", "dynamo_export_ctx")
    with torch.no_grad(), patch(model, model.config) as patched, exporting():
        classes = patched.rmsnorm_classes
        model.config.use_cache = False  # type: ignore[union-attr]  # of transformers
        graph, _ = torch._dynamo.export(model)(input_ids=ids)
    folded: nn.Module = merge(graph, classes)
    return folded


TOOLS: dict[str, Fold] = {
    "ours": ours,
    "llm-compressor": llm_compressor,
    "transformer-tricks": transformer_tricks,
    "TransformerLens": transformer_lens,
    "Brevitas": brevitas,
}
PACKAGES = {
    "llm-compressor": "llmcompressor",
    "transformer-tricks": "transformer_tricks",
    "TransformerLens": "transformer_lens",
    "Brevitas": "brevitas",
}


_PRELOADED = (
    "llmcompressor.modeling.fuse", "llmcompressor.modifiers.transform.spinquant.norm_mappings",
    "transformer_tricks", "transformer_lens.model_bridge", "torch._dynamo",
    "brevitas_examples.llm.llm_quant.ln_affine_merge", "passes",
)  # fmt: skip


class _MissingError(Exception):
    """A tool cannot be imported."""


def measure(pair: str) -> Row:
    """Return what became of `FAMILY by TOOL`."""
    name, _, tool = pair.partition(" by ")
    row: Row = {"name": pair, "family": name, "tool": tool}
    family = next(family for family in families() if family.name == name)
    model = made(family, tied=False).double()
    model.config._attn_implementation = "eager"  # type: ignore[union-attr]  # of transformers
    ids = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        before = _neutral(model)
        try:
            folded = TOOLS[tool](copy.deepcopy(model), ids)
            got = _logits(folded(ids) if tool == "TransformerLens" else folded(input_ids=ids))
        except _MissingError as error:
            return row | {"missing": str(error)}
        except Exception as error:  # noqa: BLE001 - a tool may fail in any way; that is its row
            return row | {"crashed": f"{type(error).__name__}: {str(error)[:160]}"}
    off = float((want - got).abs().max() / want.abs().max())
    return row | {"error": off, "folded": _neutral(folded) - before}


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def _neutral(model: nn.Module) -> int:
    """Return how many norms have a weight of ones, or none: of zeros where the class adds one."""
    count = 0
    for module in model.modules():
        if "norm" not in type(module).__name__.lower() or list(module.children()):
            continue
        weight = getattr(module, "weight", None)
        plain = weight is None or bool((weight == 1).all()) or bool((weight == 0).all())
        count += plain
    return count


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _MissingError(f"{type(error).__name__}: {str(error)[:160]}") from error


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(64)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w0", "unk_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def run(names: list[str], tools: list[str], out: Path, limits: Limits) -> None:
    """Measure what `out` does not hold yet."""
    done = {row["name"] for row in read(out)}
    for package in _PRELOADED:  # once, and not in every process
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    pending = [f"{name} by {tool}" for name in names for tool in tools]
    for row in run_all([pair for pair in pending if pair not in done], measure, limits, workers=1):
        if "status" in row:
            row["family"], _, row["tool"] = row["name"].partition(" by ")
            row["crashed"] = f"{row['status']}: {row['error']}"
            del row["error"]
        append(out, row)
        print(row, flush=True)


def section(rows: list[Row]) -> str:
    """Return both tables: how often each tool was what, and which family by family."""
    tools = [tool for tool in TOOLS if any(row["tool"] == tool for row in rows)]
    found = {(row["family"], row["tool"]): row for row in rows}
    names = [name for name in FAMILIES if any(row["family"] == name for row in rows)]
    names += sorted({row["family"] for row in rows} - set(names))
    counts = {t: Counter(_kind(found[n, t]) for n in names if (n, t) in found) for t in tools}
    kinds = ("right", "wrong", "crashed", "nothing folded")
    totals = [(tool, *(str(counts[tool][kind]) for kind in kinds)) for tool in tools]
    body = [(name, *(_cell(found.get((name, tool))) for tool in tools)) for name in names]
    missing = {row["tool"]: row["missing"] for row in rows if "missing" in row}
    lines = [f"{tool} cannot be imported here: {why}." for tool, why in missing.items()]
    head = [f"{_versions(tools)}; {environment('transformers')}", "", *lines]
    return "\n\n".join(
        ["\n".join(head), table(("tool", *kinds), totals), table(("family", *tools), body)]
    )


def _versions(tools: list[str]) -> str:
    return ", ".join(f"{tool} {_version(PACKAGES[tool])}" for tool in tools if tool in PACKAGES)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _kind(row: Row) -> str:
    if "missing" in row:
        return "missing"
    if "crashed" in row:
        return "crashed"
    if not row["error"] <= WRONG:
        return "wrong"
    return "right" if row["folded"] else "nothing folded"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    kind = _kind(row)
    if kind == "wrong":
        return f"**wrong ({row['error']:.2g})**"
    if kind == "crashed":
        return "crashed: " + row["crashed"].replace("|", "/").replace("\n", " ")[:60]
    return f"right, {row['folded']} norms" if kind == "right" else kind


def _named(wanted: list[str]) -> Iterator[str]:
    known = {family.name for family in families() if family.kind == "decoder"}
    for name in wanted or FAMILIES:
        if name not in known:
            raise SystemExit(f"no such decoder family: {name}")
        yield name


def main() -> None:
    """Run, and with `--write` put the tables into docs/transformers.md."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("families", nargs="*", help="only these")
    arguments.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    arguments.add_argument("--out", type=Path, default=Path("transformer_peers.jsonl"))
    arguments.add_argument("--write", action="store_true", help="write docs/transformers.md")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(list(_named(given.families)), given.tools, given.out, Limits(180.0, 8_000))
    text = section(read(given.out))
    print(text)
    if given.write:
        write_section(PAGE, "transformer-peers", text)


if __name__ == "__main__":
    main()
