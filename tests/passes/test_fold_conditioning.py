"""passes.fold on a model that amplifies rounding: exact block by block, on the same inputs.

StarNet multiplies its branches with each other, block after block. With random statistics a
relative change of 1e-14 of its input moves the output by some 1e-9: the output of the whole says
nothing of a fold. What each block makes of one and the same input does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.corpus import make
from passes import FoldNorm
from rewrite.protocol import apply_pass
from rewrite.runtime.copying import copy_model

RIGHT, WRONG = 1e-12, 1e-3


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "Block"}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.fixture(scope="module")
def starnet() -> tuple[nn.Module, nn.Module, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the model, its fold, an input, and what went into and came out of each block."""
    pytest.importorskip("timm")
    model = make("timm:starnet_s1").double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = (args[0].clone(), output.clone())

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in blocks_of(model).items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model, apply_pass(FoldNorm(), copy_model(model), (x,)).model, x, seen


def errors(folded: nn.Module, seen: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
    with torch.no_grad():
        return [
            relative(block(seen[name][0]), seen[name][1])
            for name, block in blocks_of(folded).items()
        ]


def test_each_block_is_the_same_function(starnet: Any) -> None:
    _, folded, _, seen = starnet
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert len(errors(folded, seen)) == 15 and max(errors(folded, seen)) < RIGHT


def test_the_whole_moves_no_further_than_rounding_moves_it(starnet: Any) -> None:
    model, folded, x, _ = starnet
    with torch.no_grad():
        want = model(x)
        moved = relative(model(x * (1 + 1e-14)), want)
        assert moved > 1e-12, "the model is tame, and needs no allowance"
        assert relative(folded(x), want) < 100 * moved


def test_a_wrong_block_would_show(starnet: Any) -> None:
    """The negative twin: one channel of one block off by a thousandth."""
    _, folded, _, seen = starnet
    wrong = copy_model(folded)
    block = list(blocks_of(wrong).values())[7]
    conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    conv.weight = nn.Parameter(conv.weight.detach() * 1.1)
    assert max(errors(wrong, seen)) > WRONG
