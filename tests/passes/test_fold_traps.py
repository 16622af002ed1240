"""passes.fold on what sits around a convolution: its other readers, its callers, hooks, layouts.

Each trap has a twin without it that folds, so that a refusal is one of the trap. Float64, random
statistics, exact on every input that is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import models
from passes import FoldNorm
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model

RIGHT, WRONG = 1e-10, 1e-3


def prepare(model: nn.Module) -> nn.Module:
    return models.randomize_norms_(model).double().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 7, 7)), dtype=torch.float64)


def outputs(model: nn.Module, *inputs: Any, **named: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model(*inputs, **named)
    return list(out) if isinstance(out, tuple) else [out]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    assert [t.shape for t in got] == [t.shape for t in want]
    pairs = zip(got, want, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if b.numel())


def fold(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[nn.Module, Applied]:
    """Fold a copy with and without example inputs, check both, and return the first."""
    want = outputs(model, *inputs)
    done = [apply_pass(FoldNorm(**options), copy_model(model), given) for given in (inputs, None)]
    assert all(error(outputs(applied.model, *inputs), want) < RIGHT for applied in done)
    return done[0].model, done[0]


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Unit(nn.Module):
    """conv, norm, and what a subclass does around them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.bn(self.conv(x)))


# --- other readers of the output -----------------------------------------------------------------


class Reads(Unit):
    """The output of the convolution is read a second time, as `also` reads it."""

    def __init__(self, also: Callable[[Tensor], Tensor], of: str = "conv") -> None:
        super().__init__()
        self.also, self.of = also, of

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.bn(y)
        return torch.relu(z), self.also(y if self.of == "conv" else z)


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "returned": lambda y: y,
    "indexed": lambda y: y[:, 0],
    "one_sample": lambda y: y[0],
    "sliced": lambda y: y[:, 1:3, ::2],
    "split": lambda y: y.chunk(2, 1)[0].sigmoid(),
    "reduced": lambda y: y.mean((2, 3)),
    "detached": lambda y: y.detach().abs(),
}


@pytest.mark.parametrize("name", READS)
def test_declines_where_the_output_is_also_read(name: str) -> None:
    folded, applied = fold(prepare(Reads(READS[name])), image())
    assert norms(folded) == 1
    words = ("is also read by", "has readers that were not traced")
    assert any(word in applied.skips[0].reason for word in words)


@pytest.mark.parametrize("name", READS)
def test_folds_where_the_normalized_output_is_read_twice(name: str) -> None:
    folded, _ = fold(prepare(Reads(READS[name], of="bn")), image())
    assert norms(folded) == 0


def test_a_reader_of_the_shape_alone_is_none() -> None:
    class Shape(Unit):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y).reshape(y.shape[0], y.size(1), -1)

    assert norms(fold(prepare(Shape()), image())[0]) == 0


# --- hooks on either side ------------------------------------------------------------------------


def see(_module: nn.Module, *_values: Any) -> None:
    """A hook that only looks."""


HOOKS: dict[str, tuple[str, str]] = {
    "forward hook on what writes": ("0", "register_forward_hook"),
    "pre-hook on what writes": ("0", "register_forward_pre_hook"),
    "forward hook on the norm": ("1", "register_forward_hook"),
    "pre-hook on the norm": ("1", "register_forward_pre_hook"),
    "backward hook on what writes": ("0", "register_full_backward_hook"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_declines_hooks_around_a_backward_fold(name: str) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert norms(fold(model, image())[0]) == 0, "without the hook it folds"
    place, register = HOOKS[name]
    getattr(model.get_submodule(place), register)(see)
    folded, applied = fold(model, image())
    assert norms(folded) == 1
    assert "hook" in applied.skips[0].reason


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_declines_hooks_on_what_reads(register: str) -> None:
    model = prepare(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)))
    assert norms(fold(model, image())[0]) == 0, "without the hook it folds"
    getattr(model[2], register)(see)
    folded, applied = fold(model, image())
    assert norms(folded) == 1
    assert "hook" in applied.skips[0].reason


def test_a_hook_that_reads_the_output_keeps_reading_it() -> None:
    model = prepare(Unit())
    seen: list[Tensor] = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = image()
    folded, _ = fold(model, x)
    seen.clear()
    outputs(model, x), outputs(folded, x)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Linear(4, 4, bias=False)])
def test_bakes_the_layer_that_reads(kind: str, layer: nn.Module) -> None:
    consumer = getattr(parametrizations, kind)(copy_model(layer))
    norm = nn.BatchNorm2d(4) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(4)
    model = prepare(nn.Sequential(nn.ReLU(), norm, consumer))
    x = image() if isinstance(layer, nn.Conv2d) else image(3, 4)
    want = outputs(model, x)
    applied = apply_pass(FoldNorm(), copy_model(model), (x,))
    assert norms(applied.model) == 0
    assert error(outputs(applied.model, x), want) < RIGHT


# --- layouts -------------------------------------------------------------------------------------

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_of_any_groups(dims: int, groups: int, bias: bool) -> None:
    """The weight is (in, out / groups, ...): the wrong axis would be silent where in == out."""
    conv = TRANSPOSED[dims](4, 4, 3, stride=2, output_padding=1, groups=groups, bias=bias)
    model = prepare(nn.Sequential(conv, NORMS[dims](4)))
    folded, _ = fold(model, image(2, 4, *[5] * dims))
    assert norms(folded) == 0 and folded[0].groups == groups


@pytest.mark.parametrize("multiplier", [2, 3])
def test_a_depthwise_transposed_convolution_with_a_multiplier(multiplier: int) -> None:
    conv = nn.ConvTranspose2d(4, 4 * multiplier, 3, groups=4, bias=False)
    model = prepare(nn.Sequential(conv, nn.BatchNorm2d(4 * multiplier)))
    assert norms(fold(model, image())[0]) == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_convolution_takes_a_scale_in_front_and_no_shift(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 4, 3, groups=groups, bias=False)
    model = prepare(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4, affine=False), conv))
    folded, applied = fold(model, image())
    assert norms(folded) == 1 and "taps" in applied.skips[0].reason
    model[1].running_mean.zero_()
    assert norms(fold(model, image())[0]) == 0


def test_scaling_the_wrong_axis_would_show() -> None:
    """The negative twin of the depthwise transposed convolution."""
    model = prepare(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)))
    x = image()
    wrong = fold(model, x)[0]
    wrong[0].weight.data = wrong[0].weight.flip(1)
    assert error(outputs(wrong, x), outputs(model, x)) > WRONG


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide", [3, 9])
def test_goes_into_a_linear_layer_that_has_no_bias(bias: bool, wide: int) -> None:
    model = prepare(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, wide, bias=bias)))
    folded, _ = fold(model, image(5, 6))
    assert norms(folded) == 0 and folded[2].bias.shape == (wide,)


@pytest.mark.parametrize("length", [6, 5])
def test_a_norm_over_another_axis_than_that_of_the_linear_layer(length: int) -> None:
    """(N, C, L): the norm is over C, the layer writes L, also where they are equal."""
    model = prepare(nn.Sequential(nn.Linear(6, length), nn.BatchNorm1d(6)))
    folded, applied = fold(model, image(3, 6, 6))
    assert norms(folded) == 1 and "along axis -1" in applied.skips[0].reason
    moved = prepare(nn.Sequential(nn.Linear(6, 6), Swapped(nn.BatchNorm1d(6))))
    x = image(3, 6, 6)
    done = apply_pass(FoldNorm(), copy_model(moved), (x,))
    assert norms(done.model) == 0
    assert error(outputs(done.model, x), outputs(moved, x)) < RIGHT


class Swapped(nn.Module):
    """A norm over the last axis: the twin that folds."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_and_bias_are_rounded_once_in_either_direction(dtype: torch.dtype) -> None:
    layers = (
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
    )
    model = prepare(nn.Sequential(*layers)).to(dtype).to(memory_format=torch.channels_last)
    exact = apply_pass(FoldNorm(), copy_model(model).double()).model
    folded = apply_pass(FoldNorm(), copy_model(model)).model
    assert norms(folded) == 0
    for key, value in exact.state_dict().items():
        assert torch.equal(folded.state_dict()[key], value.to(dtype)), key
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_only_what_was_frozen_is_frozen() -> None:
    layers = (
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
    )
    model = prepare(nn.Sequential(*layers))
    model[0].requires_grad_(False)
    folded, _ = fold(model, image())
    assert norms(folded) == 0
    trains = {name: p.requires_grad for name, p in folded.named_parameters()}
    assert trains == {"0.weight": False, "0.bias": False, "3.weight": True, "3.bias": True}


def test_an_empty_batch_is_an_example_input_like_another() -> None:
    model = prepare(Unit())
    folded = apply_pass(FoldNorm(), copy_model(model), (image()[:0],)).model
    assert norms(folded) == 0 and folded(image()[:0]).shape == (0, 4, 7, 7)
    x = image()
    assert error(outputs(folded, x), outputs(model, x)) < RIGHT


# --- sharing -------------------------------------------------------------------------------------


class CalledTwice(Unit):
    """One convolution at two places; `bn` normalizes one of them, `also` reads the other."""

    def __init__(self, also: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.also = also
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.relu(y) + self.also(self, self.conv(x.flip(-1)))


@pytest.mark.parametrize(
    ("also", "left"),
    [
        (lambda self, y: y.tanh(), 1),
        (lambda self, y: self.bn2(y).tanh(), 2),
        (lambda self, y: self.bn(y).tanh(), 0),
    ],
    ids=["no norm there", "another norm there", "the same norm there"],
)
def test_a_shared_convolution_folds_where_its_calls_are_normalized_alike(
    also: Callable[[Any, Tensor], Tensor], left: int
) -> None:
    model = prepare(CalledTwice(also))
    if left < 2:
        del model.bn2
    folded, applied = fold(model, image())
    assert norms(folded) == left
    if left:
        assert all("unshare clones the layer" in skip.reason for skip in applied.skips)
        unshared, _ = fold(model, image(), unshare=True)
        assert norms(unshared) == 0
    else:
        assert len(applied.changes) == 1, "folded once"


def test_functional_norms_beside_functional_convolutions() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.bias = nn.Parameter(torch.randn(4))
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.weight, self.bias, padding=1)
            return torch.relu(F.batch_norm(y, self.mean, self.var, eps=1e-3))

    folded, applied = fold(prepare(Functional()), image())
    assert len(applied.changes) == 1 and not applied.skips
    assert set(folded.state_dict()) == {"weight", "bias"}


# --- parts that are iterated over ----------------------------------------------------------------


class Mixed(nn.Module):
    """A convolution of its own for each part of the channels, as in MixNet."""

    def __init__(self, split: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.split = split
        self.stem, self.bn = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.parts = nn.ModuleList(
            nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in ((2, 3), (2, 5), (2, 1))
        )
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        parts = [part(piece) for piece, part in zip(self.split(x), self.parts, strict=False)]
        return torch.relu(self.bn2(torch.cat(parts, 1)))


SPLITS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "function": (lambda x: torch.split(x, [2, 2, 2], dim=1), 0),
    "method": (lambda x: x.split((2, 2, 2), 1), 0),
    "by name": (lambda x: torch.split(x, split_size_or_sections=[2, 2, 2], dim=1), 0),
    "split_with_sizes": (lambda x: x.split_with_sizes([2, 2, 2], 1), 0),
    "one more part": (lambda x: torch.split(x, [2, 2, 2, 0], dim=1), 0),
    "by one size": (lambda x: torch.split(x, 2, dim=1), 2),
    "chunks": (lambda x: x.chunk(3, 1), 2),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_by_sizes_are_followed_and_a_number_that_depends_on_the_input_is_not(
    name: str,
) -> None:
    split, left = SPLITS[name]
    folded, _ = fold(prepare(Mixed(split)), image())
    assert norms(folded) == left


class SometimesLeftOut(nn.Module):
    """A norm behind torchvision's stochastic depth, which leaves whole samples out in training."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.always = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), training

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import stochastic_depth

        return self.bn(stochastic_depth(self.conv(x), 0.5, "row", self.always))


@pytest.mark.parametrize("training", [False, True])
def test_a_shift_passes_stochastic_depth_only_where_it_does_nothing(training: bool) -> None:
    pytest.importorskip("torchvision")
    model = prepare(SometimesLeftOut(training))
    applied = apply_pass(FoldNorm(), copy_model(model), (image(),))
    assert norms(applied.model) == int(training)
    torch.manual_seed(3)
    x = image()
    torch.manual_seed(4)
    want = outputs(model, x)
    torch.manual_seed(4)
    assert error(outputs(applied.model, x), want) < RIGHT
