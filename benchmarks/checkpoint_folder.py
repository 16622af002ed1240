"""A checkpoint folder converted tensor by tensor, beside copying it: wall time and peak memory.

Writes a Llama of random bfloat16 weights in shards (no model is ever built), then runs, each in a
process of its own: `cp -r` of the folder, the plan alone, `rewrite convert --fold --no-verify`, the
same with its proof, and the imports alone, which are the floor of the memory.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks._process import REWRITE, Run, run
from benchmarks._table import environment, parser, publish, table
from rewrite.files.safetensors_header import header_of
from rewrite.hub.safetensors_file import bytes_of

_IMPORTS = (
    "import torch, transformers, rewrite, passes, rewrite.sharded.convert, rewrite.observe.outcomes"
)

_PLAN = "convert --fold --dry-run"


def main() -> None:
    """Write the folder, run every command, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8, help="decoder layers (default 8)")
    arguments.add_argument("--width", type=int, default=4096, help="hidden size (default 4096)")
    arguments.add_argument("--proof", action="store_true", help="time the proof, too")
    arguments.add_argument("--folder", type=Path, default=None, help="where to work")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        work = Path(name)
        size = write_llama(work / "llama", chosen.layers, chosen.width)
        rows = measure(work, proof=chosen.proof)
    floor, copied, planned = rows["imports"], rows["cp -r"], rows[_PLAN]
    body = table(
        ["", "wall", "CPU", "wall after the plan, of cp", "peak over imports"],
        [
            [
                label, f"{took.wall:.1f} s", f"{took.cpu:.1f} s",
                f"{(took.wall - planned.wall) / copied.wall:.2f}" if "fold" in label else "",
                f"{max(0.0, took.peak - floor.peak):,.0f} MB",
            ]
            for label, took in rows.items()
        ],
    )  # fmt: skip
    apart = planned.wall - floor.wall
    cpu = planned.cpu - floor.cpu
    body += f"\n\nPlan and capture, without the imports: {apart:.1f} s, {cpu:.1f} s of CPU."
    described = f"{size / 1e9:.1f} GB in bfloat16, {chosen.layers} layers of width {chosen.width}."
    note = f"{described} {environment('transformers', 'safetensors')}."
    publish(
        "checkpoint-folder", "A folder tensor by tensor", f"{body}\n\n{note}", write=chosen.write
    )


def write_llama(folder: Path, layers: int, width: int) -> int:
    """Write a Llama of random weights; return the bytes of its tensors."""
    folder.mkdir()
    inner, vocabulary, heads = width * 11 // 4, 32000, max(1, width // 128)
    shapes: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, width)}]
    for layer in range(layers):
        own = f"model.layers.{layer}"
        shapes.append(
            {
                f"{own}.input_layernorm.weight": (width,),
                **{f"{own}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"},
                f"{own}.post_attention_layernorm.weight": (width,),
                f"{own}.mlp.gate_proj.weight": (inner, width),
                f"{own}.mlp.up_proj.weight": (inner, width),
                f"{own}.mlp.down_proj.weight": (width, inner),
            }
        )
    shapes.append({"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)})
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shapes, start=1):
        name = f"model-{number:05}-of-{len(shapes):05}.safetensors"
        total += _write_shard(folder / name, shard)
        places.update(dict.fromkeys(shard, name))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    head, _ = header_of(
        {name: ("BF16", shape, sizes[name]) for name, shape in shapes.items()}, {"format": "pt"}
    )
    with path.open("wb") as stream:
        stream.write(head)
        for shape in shapes.values():
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02)
            stream.write(bytes_of(tensor if len(shape) > 1 else tensor + 1))
    return sum(sizes.values())


def measure(work: Path, *, proof: bool) -> dict[str, Run]:
    """Run each command once, after the folder was read once."""
    commands: dict[str, tuple[str, ...]] = {
        "imports": (sys.executable, "-c", _IMPORTS),
        "cp -r": ("cp", "-r", "llama", "out"),
        _PLAN: (*REWRITE, "convert", "--fold", "llama", "--dry-run"),
        "convert --fold --no-verify": (*REWRITE, "convert", "--fold", "llama", "-o", "out",
                                       "--no-verify"),
    }  # fmt: skip
    if proof:
        commands["convert --fold"] = (*REWRITE, "convert", "--fold", "llama", "-o", "out")
    rows = {}
    for label, command in commands.items():
        shutil.rmtree(work / "out", ignore_errors=True)
        rows[label] = run(command, work)
    return rows


if __name__ == "__main__":
    main()
