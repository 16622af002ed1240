"""torch.compile of weight-normed models: the same values and gradients, for either computation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from passes import RemoveWeightNorm, WeightNorm
from rewrite.pipeline import convert


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).double()  # fmt: skip


def normed(origin: str) -> nn.Module:
    model = plain()
    if origin == "torch":
        for index in (0, 4):  # none of its `dim`s is right for the transposed convolution
            parametrizations.weight_norm(model[index])
        return model
    return convert(model, [WeightNorm()], verify=False).model


def measured(model: nn.Module, call: nn.Module, x: torch.Tensor):
    model.zero_grad()
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def check(origin: str, backend: str) -> None:
    model = normed(origin)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        for was, now in zip(measured(model, model, x), measured(model, compiled, x), strict=True):
            torch.testing.assert_close(now, was, rtol=1e-10, atol=1e-10)
        # g and v are inputs of the compiled code, not constants: a step of training shows.
        with torch.no_grad():
            model[0].parametrizations.weight.original0.mul_(1.5)
    after = compiled(x).detach()
    assert not torch.allclose(after, copy.deepcopy(plain())(x), rtol=1e-3)
    off = convert(model, [RemoveWeightNorm()], verify=False).model
    torch.testing.assert_close(
        torch.compile(off, backend=backend, fullgraph=True)(x), after, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("origin", ["ours", "torch"])
def test_compiled_is_the_same(origin):
    check(origin, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["ours", "torch"])
def test_compiled_by_inductor_is_the_same(origin):
    check(origin, "inductor")


def test_a_compiled_model_is_rewritten_like_the_model():
    """What `torch.compile` returns is a module; the layers are below it."""
    compiled = torch.compile(plain(), backend="eager")
    result = convert(compiled, [WeightNorm()], verify=False)
    assert [c.target.rpartition(".")[2] for c in result.report.changes] == ["0", "2", "4"]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), plain()(x), rtol=0, atol=0)
