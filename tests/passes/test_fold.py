"""passes.fold: every trap in float64, with random statistics; each fold has a negative twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import models
import rewrite
from passes import FoldNorm
from rewrite.errors import OptionError, PassError
from rewrite.outcomes import Selection
from rewrite.protocol import Applied, apply_pass
from rewrite.runtime.copying import copy_model
from rewrite.runtime.leaves import tensors

RIGHT, WRONG = 1e-10, 1e-3


def run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(*inputs))


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    assert [t.shape for t in got] == [t.shape for t in want]
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)).item()
        for a, b in zip(got, want, strict=True)
        if b.numel()
    ]
    return max(errors, default=0.0)


def prepare(model: nn.Module) -> nn.Module:
    return models.randomize_norms_(model).double().eval()


def fold(
    model: nn.Module,
    *inputs: Tensor,
    shapes: bool = True,
    selection: Selection | None = None,
    **options: Any,
) -> tuple[nn.Module, Applied]:
    """Fold a copy, check that it is the same function, and return it with what was done."""
    want = run(model, inputs)
    applied = apply_pass(
        FoldNorm(**options), copy_model(model), inputs if shapes else None, selection=selection
    )
    assert difference(run(applied.model, inputs), want) < RIGHT
    assert difference(run(model, inputs), want) == 0, "the original changed"
    return applied.model, applied


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())


def image(channels: int = 3, size: int = 7) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


# --- every reference model -----------------------------------------------------------------------

FOLDED_AND_LEFT = {
    "shared_conv": (0, 1), "shared_conv_and_norm": (1, 0), "shared_norm": (1, 0),
    "two_norms_one_conv": (0, 2), "norm_under_two_names": (1, 0), "tied_convs": (0, 2),
    "block_under_two_names": (1, 0), "escaping_conv": (0, 1), "block_called_in_parts": (0, 1),
    "recursion": (0, 1), "plain_containers": (2, 0), "functional_norm": (1, 0),
    "functional_norm_deep": (2, 0), "torch_norm": (1, 0), "functional_conv": (1, 0),
    "norm_with_activation": (1, 0), "norm_calls_super": (0, 1), "linear_norm": (1, 0),
    "linear_norm_square": (0, 1), "norm1d": (1, 0), "norm3d": (1, 0), "grouped_transpose": (1, 0),
    "depthwise": (2, 0), "conv_relu_norm": (1, 1), "norm_first": (2, 1), "norm_norm": (2, 0),
    "train_mode_norm": (1, 1), "without_statistics": (0, 1), "affine_free": (1, 0),
    "bias_free": (1, 0), "frozen_norm": (1, 0), "sync_norm": (1, 0), "extreme_statistics": (1, 0),
    "registration_order": (2, 0), "graph_module_inside": (2, 0), "graph_module_root": (2, 0),
    "residual": (2, 0), "pre_activation": (1, 2), "dense_connections": (0, 2),
    "transformer": (3, 0), "batch_norm_transformer": (2, 0), "hook_on_conv": (0, 1),
    "hook_on_norm": (0, 1), "pre_hook_on_norm": (0, 1), "hook_on_parent": (1, 0),
    "parametrized_conv": (1, 0), "old_weight_norm": (1, 0), "parametrized_norm": (1, 0),
    "channels_last": (1, 0), "train_mode": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED_AND_LEFT)
def test_reference_model(name: str) -> None:
    model, inputs = models.build(name)
    want = run(model, inputs)
    applied = apply_pass(FoldNorm(), copy_model(model), inputs)
    assert difference(run(applied.model, inputs), want) < RIGHT
    assert (len(applied.changes), len(applied.skips)) == FOLDED_AND_LEFT[name]
    assert all(len(skip.reason) > 20 for skip in applied.skips)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shared_conv", "conv is called more than once, and at conv_1"),
        ("two_norms_one_conv", "is also read by bn2"),
        ("tied_convs", "conv1.weight is one tensor with conv2.weight"),
        ("escaping_conv", "the value is returned by the model"),
        ("linear_norm_square", "fc writes its channels along axis -1"),
        ("conv_relu_norm", "relu bends at zero"),
        ("norm_first", "conv1 pads its input with zeros (padding=1)"),
        ("train_mode_norm", "is in training mode"),
        ("without_statistics", "has no running statistics"),
        ("hook_on_conv", "conv has a forward hook"),
        ("pre_hook_on_norm", "has a forward pre-hook"),
        ("branching_root", "the model is opaque"),
    ],
)
def test_declines_with_the_reason(name: str, words: str) -> None:
    model, inputs = models.build(name)
    applied = apply_pass(FoldNorm(), model, inputs)
    assert any(words in skip.reason for skip in applied.skips)


def test_a_wrong_fold_would_show() -> None:
    """The negative twin: a fold that ignores sharing is off by far more than the tolerance."""
    model, inputs = models.build("shared_conv")
    want = run(model, inputs)
    norm = model.bn
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    model.conv.weight.data = model.conv.weight * scale.view(-1, 1, 1, 1)
    model.bn = nn.Identity()
    assert difference(run(model, inputs), want) > WRONG


# --- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_bias_appears_where_it_is_needed(bias: bool, affine: bool) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine)))
    folded, applied = fold(model, image())
    assert norms(folded) == 0
    assert folded[0].bias is not None
    assert set(applied.changes[0].keys) == {k for k in model.state_dict() if k.startswith("1.")}


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AvgPool2d(2),
        nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.AdaptiveAvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReflectionPad2d(1),
        nn.PixelUnshuffle(1),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_passes_what_commutes(between: nn.Module) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)))
    folded, _ = fold(model, image(size=8))
    assert norms(folded) == 0


@pytest.mark.parametrize(
    "between",
    [
        nn.GELU(), nn.Sigmoid(), nn.AvgPool2d(3, padding=1), nn.ZeroPad2d(1), nn.ReLU(),
        nn.Softmax(1),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_declines_what_does_not_commute(between: nn.Module) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4), nn.ReLU()))
    folded, applied = fold(model, image(size=8))
    assert norms(folded) == 1
    assert len(applied.skips) == 1


@pytest.mark.parametrize("positive", [True, False])
def test_max_pooling_passes_positive_scales_only(positive: bool) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)))
    weight = model[2].weight.data
    model[2].weight.data = weight.abs() + 0.1 if positive else -weight.abs() - 0.1
    folded, applied = fold(model, image(size=8))
    assert norms(folded) == (0 if positive else 1)
    assert positive or "positive" in applied.skips[0].reason


class Shapes(nn.Module):
    """A norm behind an operation that only moves data."""

    def __init__(self, move: Any, norm: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.conv, self.move, self.norm = nn.Conv2d(3, out, 3), move, norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.move(self.conv(x))))


MOVES: dict[str, tuple[Any, nn.Module, int]] = {
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), nn.BatchNorm2d(2), 8),
    "flatten_pooled": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), nn.BatchNorm1d(8), 8),
    "view_pooled": (
        lambda x: (lambda y: y.view(y.size(0), -1))(F.adaptive_avg_pool2d(x, 1)),
        nn.BatchNorm1d(8), 8,
    ),
    "mean": (lambda x: x.mean((2, 3)), nn.BatchNorm1d(8), 8),
    "flatten_space": (lambda x: x.flatten(2), nn.BatchNorm1d(8), 8),
    "permute_back": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), nn.BatchNorm2d(8), 8),
    "reshape": (lambda x: x.reshape(2, 8, 25), nn.BatchNorm1d(8), 8),
    "transpose": (lambda x: x.transpose(2, 3).contiguous(), nn.BatchNorm2d(8), 8),
    "slice": (lambda x: x[:, :, ::2, 1:], nn.BatchNorm2d(8), 8),
    "slice_channels": (lambda x: x[:, 2:6], nn.BatchNorm2d(4), 8),
    "chunk": (lambda x: x.chunk(2, 1)[1], nn.BatchNorm2d(4), 8),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0), nn.BatchNorm2d(8), 8),
    "squeeze": (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1), nn.BatchNorm1d(8), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_follows_the_channels(name: str) -> None:
    move, norm, out = MOVES[name]
    folded, applied = fold(prepare(Shapes(move, norm, out)), image())
    assert norms(folded) == 0, applied.skips


@pytest.mark.parametrize("name", ["pixel_shuffle", "mean", "flatten_space", "chunk", "slice"])
def test_needs_no_example_inputs(name: str) -> None:
    move, norm, out = MOVES[name]
    folded, _ = fold(prepare(Shapes(move, norm, out)), image(), shapes=False)
    assert norms(folded) == 0


def test_a_linear_layer_of_unknown_rank_needs_example_inputs() -> None:
    model = prepare(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    x = torch.randn(4, 6, dtype=torch.float64)
    _, without = fold(model, x, shapes=False)
    assert "pass example_inputs" in without.skips[0].reason
    folded, _ = fold(model, x)
    assert norms(folded) == 0


def test_declines_a_norm_that_maps_positions() -> None:
    model = prepare(Shapes(lambda x: x.flatten(1), nn.BatchNorm1d(200), 8))
    _, applied = fold(model, image())
    assert "maps the positions" in applied.skips[0].reason


class TwoInputs(nn.Module):
    def __init__(self, join: Any, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.join, self.norm = join, nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.join(self, self.one(x), torch.tanh(x))))


@pytest.mark.parametrize(
    ("join", "channels"),
    [
        (lambda self, y, x: torch.cat([y, self.two(x)], 1), 8),
        (lambda self, y, x: y + self.two(x), 4),
        (lambda self, y, x: y - self.two(x), 4),
        (lambda self, y, x: torch.cat([y, self.two(x)], 2), 4),
    ],
    ids=["cat", "add", "sub", "cat_in_space"],
)
def test_splits_over_branches(join: Any, channels: int) -> None:
    _, applied = fold(prepare(TwoInputs(join, channels)), image(), merge=False)
    assert "norm" in {change.target for change in applied.changes}, applied.skips


def test_a_product_takes_a_scale_but_no_shift() -> None:
    model = TwoInputs(lambda self, y, x: y * torch.sigmoid(self.two(x)), 4)
    _, applied = fold(prepare(model), image())
    assert len(applied.skips) == 1
    model.norm = nn.BatchNorm2d(4, affine=False).double().eval()
    model.norm.running_var.uniform_(0.5, 2)
    folded, _ = fold(model, image())
    assert norms(folded) == 0


# --- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "folds"),
    [
        (nn.Conv2d(4, 3, 3), True),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), True),
        (nn.Conv2d(4, 3, 3, padding=1), False),
        (nn.Conv2d(4, 3, 1, padding=1), False),
        (nn.Conv2d(4, 3, 3, padding="same"), False),
        (nn.Conv2d(4, 3, 1, padding="same"), True),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate"), True),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), True),
        (nn.ConvTranspose2d(4, 3, 3), False),
        (nn.ConvTranspose2d(4, 3, 1), True),
    ],
)
def test_goes_into_what_follows(layer: nn.Module, folds: bool) -> None:
    model = prepare(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), layer))
    folded, applied = fold(model, image(4))
    assert norms(folded) == (0 if folds else 1)
    assert folds or "zeros" in applied.skips[0].reason or "taps" in applied.skips[0].reason


def test_zero_padding_lets_a_scale_pass() -> None:
    model = prepare(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)))
    model[1].bias.data = (
        model[1].running_mean * model[1].weight.data / (model[1].running_var + model[1].eps).sqrt()
    )
    scale = model[1].weight.data / (model[1].running_var + model[1].eps).sqrt()
    model[1].running_mean.zero_()
    model[1].bias.data.zero_()
    folded, _ = fold(model, image(4))
    assert norms(folded) == 0
    assert not torch.equal(scale, torch.ones_like(scale))


def test_goes_into_a_linear_layer_behind_flatten() -> None:
    model = prepare(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5)))
    folded, _ = fold(model, image(4, 3), shapes=False)
    assert norms(folded) == 0


class ManyReaders(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(6), *(nn.Linear(6, 6) for _ in "qkv")
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.q(x) * torch.tanh(self.k(x)) + self.v(x) + self.last(x)


def test_goes_into_all_readers() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    folded, applied = fold(prepare(ManyReaders(nn.Linear(6, 1))), x)
    assert folded.norm.weight is None
    assert folded.norm.bias is None
    assert set(applied.changes[0].touched) == {"norm", "q", "k", "v", "last"}


def test_declines_when_one_reader_cannot() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    folded, applied = fold(prepare(ManyReaders(nn.ReLU())), x)
    assert folded.norm.weight is not None
    assert "last (ReLU)" in applied.skips[0].reason


def test_affine_parts_of_other_norms() -> None:
    model = prepare(
        nn.Sequential(
            nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6, affine=True),
            nn.Conv2d(6, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
        )
    )  # fmt: skip
    folded, applied = fold(model, image(4))
    assert [c.target for c in applied.changes] == ["0", "2"]
    assert folded[0].weight is None
    assert folded[4].weight is not None


# --- constants -----------------------------------------------------------------------------------


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        self.conv, self.frozen = nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)
        self.conv2, self.gamma = nn.Conv2d(4, 4, 1), nn.Parameter(torch.randn(4, 1, 1))
        for buffer in self.frozen.buffers():
            buffer.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.frozen(self.conv(x)))
        return torch.sigmoid(x) + self.gamma * self.conv2(x)


def test_frozen_norms_and_layer_scales_go() -> None:
    folded, applied = fold(prepare(Constants()), image())
    assert {c.target for c in applied.changes} == {"frozen", "gamma"}
    assert "gamma" not in folded.state_dict()
    assert not any(key.startswith("frozen.") for key in folded.state_dict())


# --- dtypes, modes, memory -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_the_weight_once(dtype: torch.dtype) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    exact = copy_model(model).double()
    scale = exact[1].weight / (exact[1].running_var + exact[1].eps).sqrt()
    want = (exact[0].weight * scale.view(-1, 1, 1, 1)).to(dtype)
    folded = apply_pass(FoldNorm(), copy_model(model)).model
    assert torch.equal(folded[0].weight, want)
    assert folded[0].bias.dtype == dtype


def test_two_norms_round_once() -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    model = model.float()
    exact = copy_model(model).double()
    scale = 1.0
    for norm in (exact[1], exact[2]):
        scale = scale * norm.weight / (norm.running_var + norm.eps).sqrt()
    want = exact[0].weight * scale.view(-1, 1, 1, 1)
    folded = apply_pass(FoldNorm(), model).model
    error = ((folded[0].weight.double() - want) / want).abs().max()
    assert error <= 2**-24


def test_keeps_channels_last_and_frozen() -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded, _ = fold(model, image())
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad


def test_an_empty_batch_passes() -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    folded, _ = fold(model, image())
    assert folded(image()[:0]).shape == (0, 8, 5, 5)


def test_the_original_is_untouched() -> None:
    model, inputs = models.build("residual")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = rewrite.convert(model, [FoldNorm()], example_inputs=inputs)
    assert result.report.passes[0].ok
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- selection and options -----------------------------------------------------------------------


def test_a_norm_that_is_left_out_takes_up_its_neighbour() -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    folded, applied = fold(model, image(), selection=Selection(skip=("1",)))
    assert norms(folded) == 1
    assert applied.changes[0].after == "folded into 1"


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.tail = nn.Sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(self.conv(x))) + self.conv(torch.tanh(x))


def test_unshare_clones_the_layer() -> None:
    model = prepare(Shared())
    _, applied = fold(model, image())
    assert "unshare clones the layer" in applied.skips[0].reason
    folded, applied = fold(model, image(), unshare=True)
    assert norms(folded) == 0
    assert torch.equal(folded.conv.weight, model.conv.weight)
    assert "conv_clone" in applied.changes[0].touched


def test_unshare_leaves_alone_what_folds_anyway() -> None:
    model, inputs = models.build("shared_conv_and_norm")
    folded, _ = fold(model, *inputs, unshare=True)
    assert len(list(folded.modules())) == len(list(model.modules()))


def test_compensate_lets_other_readers_take_up_the_inverse() -> None:
    model, inputs = models.build("two_norms_one_conv")
    folded, applied = fold(model, *inputs, compensate=True)
    assert (len(applied.changes), len(applied.skips)) == (1, 1)
    assert norms(folded) == 1


def test_leftovers_become_one_multiply_add() -> None:
    model, inputs = models.build("conv_relu_norm")
    folded, applied = fold(model, *inputs, leftover="affine")
    assert norms(folded) == 0
    assert not applied.skips
    assert any("multiply-add" in change.after for change in applied.changes)


class Normalized(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.4, 0.5, 0.6], dtype=x.dtype).view(1, 3, 1, 1)
        std = torch.tensor([0.2, 0.3, 0.25], dtype=x.dtype).view(1, 3, 1, 1)
        return self.model((x - mean) / std)


@pytest.mark.parametrize("shapes", [True, False])
def test_input_norm(shapes: bool) -> None:
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = image()
    option = FoldNorm(input_norm="0.4,0.5,0.6/0.2,0.3,0.25")
    result = rewrite.convert(model, [option], example_inputs=(x,))
    assert result.report.passes[0].ok
    assert difference(run(result.model, (x,)), run(Normalized(model), (x,))) < RIGHT
    assert difference(run(result.model, (x,)), run(model, (x,))) > WRONG


def test_input_norm_in_front_of_zero_padding_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()
    with pytest.raises(PassError, match="pads its input with zeros"):
        apply_pass(FoldNorm(input_norm="0,0,1/1,1,2"), model, (torch.randn(1, 3, 5, 5),))


@pytest.mark.parametrize("text", ["1,2", "1,2/3", "a/b", "1/0"])
def test_input_norm_is_checked(text: str) -> None:
    with pytest.raises(OptionError, match="input_norm"):
        FoldNorm(input_norm=text)


def test_leftover_is_checked() -> None:
    with pytest.raises(OptionError, match="leftover"):
        FoldNorm(leftover="drop")


def test_a_parametrized_layer_can_be_baked_first() -> None:
    conv = weight_norm(nn.Conv2d(3, 4, 3))
    model = prepare(nn.Sequential(conv, nn.BatchNorm2d(4)))
    x = image()
    result = rewrite.convert(model, ["remove-weight-norm", "fold"], example_inputs=(x,))
    assert norms(result.model) == 0
    assert difference(run(result.model, (x,)), run(model, (x,))) < RIGHT


# --- in-place operations -------------------------------------------------------------------------


class WritesInPlace(nn.Module):
    """Removing the norm would let ReLU write into a value that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        z = self.norm(y)
        z *= 2.0
        return self.conv(z) + y


def test_the_same_without_writing_folds() -> None:
    class DoesNotWrite(WritesInPlace):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(x)
            return self.conv(self.norm(y) * 2.0) + y

    model = DoesNotWrite().double().eval()
    model.norm.running_var.uniform_(0.5, 2)
    assert norms(fold(model, image())[0]) == 0


def test_declines_where_x_would_be_overwritten() -> None:
    model = WritesInPlace().double().eval()
    model.norm.running_var.uniform_(0.5, 2)
    folded, applied = fold(model, image())
    assert norms(folded) == 1
    assert "writes into its output" in applied.skips[0].reason
