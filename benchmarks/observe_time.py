"""Time and memory of the observed road on a Llama, beside torch.export and the model's size.

ratio = time of one observed call / time of torch.export on the same call
peak  = largest resident growth while the norms fold / bytes of the parameters
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks._optional import required
from benchmarks._table import environment, publish, table
from rewrite.fold.observed import carry_out
from rewrite.graph.capture import capture
from rewrite.observe.calls import default_calls
from rewrite.observe.evidence import Evidence, observe
from rewrite.observe.export import export_call
from rewrite.observe.outcomes import decide
from rewrite.observe.plan import ObservedFold, Options

transformers = required("transformers")


def llama(layers: int, width: int, device: str) -> nn.Module:
    """Return a Llama of that depth and width."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


def capture_row(layers: int) -> tuple[Any, ...]:
    """Return the times of one export, of one observed call, and of all decisions."""
    model = llama(layers, 4096, "meta")
    first, *_ = calls = default_calls(model)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    ids = first.inputs.kwargs["input_ids"]
    export_call(model, first)  # what is imported and cached on first use
    exported = _timed(lambda: torch.export.export(Plain(), (ids,), strict=False))
    observed = _timed(lambda: export_call(model, first))
    evidence = observe(model, calls[:1])
    planned = _timed(lambda: list(decide(capture(model), evidence, Options())))
    return (
        layers, f"{exported:.1f} s", f"{observed:.1f} s", f"{observed / exported:.2f}",
        f"{planned:.1f} s",
    )  # fmt: skip


def fold_row(layers: int, width: int) -> tuple[Any, ...]:
    """Return how much memory a fold in place takes beside the model."""
    model = llama(layers, width, "cpu")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    evidence: Evidence = observe(model, default_calls(model)[:1])
    captured = capture(model)
    captured.exact = None  # nothing is going to be verified: old tensors may go
    found = list(decide(captured, evidence, Options()))
    before = _resident()
    peak = before
    start = time.perf_counter()
    for _, text, fold in found:
        if isinstance(fold, ObservedFold):
            carry_out(captured, fold, text)
            peak = max(peak, _resident())
    seconds = time.perf_counter() - start
    return (
        layers,
        f"{size / 2**20:.0f} MiB",
        f"{1 + (peak - before) / size:.2f}",
        f"{seconds:.1f} s",
    )


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a file of ours
        return int(file.read().split()[1]) * 4096


def main() -> None:
    """Print both tables; with `--write` put them into docs/benchmarks.md."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument(
        "--billion", action="store_true", help="fold a billion parameters too (9 GB of memory)"
    )
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    times = [capture_row(layers) for layers in (8, 32)]
    memory = [fold_row(8, 1024)]
    if given.billion:
        memory.append(fold_row(16, 2048))
    body = "\n\n".join(
        [
            environment("transformers"),
            table(("layers (meta)", "torch.export", "observed", "ratio", "decisions"), times),
            table(("layers", "model", "peak / model", "fold"), memory),
        ]
    )
    publish("observe-time", "Observing a Llama, and folding it in place", body, write=given.write)


if __name__ == "__main__":
    main()
