"""rewrite.path_norm: against every path written out, under rescaling, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewrite
from models import randomize_norms_
from rewrite.errors import CaptureError, OptionError
from rewrite.rescaling.path_norm import path_norms, path_norms_by_region

RIGHT, WRONG = 1e-12, 1e-3
ORDERS = (1.0, 2.0, 3.0, math.inf)


# -- the oracle: all paths, one number each -------------------------------------------------------


def edges(layer: Callable[[Tensor], Tensor], shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and bias of a layer that is affine on single positive values."""
    size = math.prod(shape)
    with torch.no_grad():
        bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
        columns = layer(basis).reshape(size, -1) - bias
    return columns.T.numpy(), bias.numpy()


Paths = list[np.ndarray]
"""Of each unit, the products of all paths that end in it."""


def through(paths: Paths, matrix: np.ndarray, bias: np.ndarray) -> Paths:
    result = []
    for row, constant in zip(matrix, bias, strict=True):
        ways = [row[i] * paths[i] for i in np.flatnonzero(row)]
        if constant:
            ways.append(np.array([constant]))
        result.append(np.concatenate(ways) if ways else np.zeros(0))
    return result


def norm_of_paths(paths: Paths, p: float) -> float:
    every = np.abs(np.concatenate(paths))
    return float(every.max() if math.isinf(p) else (every**p).sum() ** (1 / p))


class Chain(nn.Module):
    """Steps one after the other; "skip" adds, "cat" concatenates what came two steps before."""

    def __init__(self, steps: Sequence[nn.Module | str]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.layers = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        before, layers = x, iter(self.layers)
        for step in self.steps:
            if step == "mark":
                before = x
            elif step == "skip":
                x = x + before
            elif step == "cat":
                x = torch.cat([x, before], 1)
            elif step == "double":
                x = 2 * x
            elif step == "mean":
                x = x.mean((2, 3))
            else:
                x = next(layers)(x)
        return x


def written_out(chain: Chain, shape: Sequence[int]) -> Paths:
    """Return every path of a chain: each layer's matrix is read off unit inputs."""
    paths: Paths = [np.ones(1) for _ in range(math.prod(shape))]
    before = paths
    for step in chain.steps:
        if step == "mark":
            before = paths
        elif step == "skip":
            paths = [np.concatenate(pair) for pair in zip(paths, before, strict=True)]
        elif step == "cat":
            paths = [*paths, *before]
            shape = (2 * shape[0], *shape[1:])
        else:
            layer = {"double": lambda x: 2 * x, "mean": lambda x: x.mean((2, 3))}.get(step, step)
            paths = through(paths, *edges(layer, shape))
            with torch.no_grad():
                shape = layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
    return paths


geometry = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 2),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 1),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


def conv(options: dict[str, int]) -> nn.Module:
    return nn.Conv2d(2, 2, **options)


def transposed(options: dict[str, int]) -> nn.Module:
    options = {**options, "padding": min(options["padding"], options["kernel_size"] - 1)}
    return nn.ConvTranspose2d(2, 2, output_padding=options["stride"] - 1, **options)


WITHOUT_WEIGHTS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(1.0),
    "max": lambda: nn.MaxPool2d(2, 1, padding=1),
    "max ceil": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "max dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "average": lambda: nn.AvgPool2d(2, 1, padding=1),
    "average without padding": lambda: nn.AvgPool2d(2, 2, padding=1, count_include_pad=False),
    "average ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True),
    "divisor": lambda: nn.AvgPool2d(2, 1, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d((2, 3)),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(size=(3, 5), mode="bilinear", align_corners=False),
    "corners": lambda: nn.Upsample(size=(4, 3), mode="bilinear", align_corners=True),
    "reflect": lambda: nn.ReflectionPad2d(1),
    "zeros": lambda: nn.ZeroPad2d((1, 0, 0, 1)),
    "constant": lambda: nn.ConstantPad2d((1, 0, 0, 0), 0.5),
    "flatten": lambda: nn.Flatten(2),
    "batch norm": lambda: nn.BatchNorm2d(2),
}


def random_chain(steps: Sequence[nn.Module | str], seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return randomize_norms_(Chain(steps).double().eval(), seed)


def agree(chain: Chain, shape: Sequence[int], ps: Sequence[float] = ORDERS) -> None:
    paths = written_out(chain, shape)
    found = path_norms(chain, tuple(ps), torch.zeros(1, *shape))
    for p in ps:
        assert found[p] == pytest.approx(norm_of_paths(paths, p), rel=RIGHT), p


@given(options=geometry, up=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_sum_over_all_paths_through_convolutions(
    options: dict[str, int], up: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    first = conv({**options, "padding": 1})
    second = (transposed if up else conv)({**options, "stride": 1, "padding": 1})
    agree(random_chain([first, nn.ReLU(), second], seed), (2, 3, 3))


@pytest.mark.parametrize("name", sorted(WITHOUT_WEIGHTS))
@settings(max_examples=4)
@given(seed=st.integers(0, 99))
def test_equals_the_sum_over_all_paths_through(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    steps = [nn.Conv2d(2, 2, 2, padding=1), nn.ReLU(), WITHOUT_WEIGHTS[name]()]
    if name != "flatten":
        steps += ["mark", nn.Conv2d(2, 2, 1), "skip", "cat", "double", "mean", nn.Linear(4, 2)]
    agree(random_chain(steps, seed), (2, 3, 3))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    kinds = {1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d), 3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d)}
    conv_, max_, mean_ = kinds[dims]
    agree(
        random_chain([conv_(1, 2, 2), max_(2, 1), mean_(2, 1)]),
        (1, *(4,) * dims),
        (1, 2, math.inf) if dims == 1 else (2,),
    )


def test_padding_modes_are_padding_and_then_the_convolution() -> None:
    torch.manual_seed(0)
    inside = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    outside = nn.Conv2d(2, 2, 3)
    outside.load_state_dict(inside.state_dict())
    x = torch.zeros(1, 2, 4, 4)
    one = path_norms(nn.Sequential(inside, nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False)), ORDERS, x)
    torch.manual_seed(0)
    two = nn.Sequential(nn.ReflectionPad2d(1), outside, nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
    assert path_norms(two, ORDERS, x).keys() == one.keys()
    assert path_norms(inside, ORDERS, x) == path_norms(nn.Sequential(*two[:2]), ORDERS, x)


# -- batch norms ----------------------------------------------------------------------------------


def block(norm_first: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    if norm_first:
        layers = [nn.BatchNorm2d(3), *layers, nn.BatchNorm2d(4)]
    return randomize_norms_(nn.Sequential(*layers).double().eval())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("p", ORDERS)
def test_a_folded_network_has_the_norm_of_the_one_it_was(norm_first: bool, p: float) -> None:
    model, x = block(norm_first), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    folded = rewrite.convert(model, ["fold"], example_inputs=(x,)).model
    assert rewrite.path_norm(model, p, x) == pytest.approx(
        rewrite.path_norm(folded, p, x), rel=RIGHT
    )
    assert rewrite.path_norm(model.train(), p, x) == rewrite.path_norm(model.eval(), p, x)


def test_squaring_parameters_is_another_number() -> None:
    model, x = block(), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    squared = block()
    with torch.no_grad():
        for parameter in squared.parameters():
            parameter.square_()
        naive = float(squared(torch.ones_like(x)).sum().sqrt())
    assert abs(naive / rewrite.path_norm(model, 2, x) - 1) > WRONG


# -- rescaling ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999))
def test_does_not_notice_a_rescaling(seed: int) -> None:
    torch.manual_seed(seed)
    first, second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 3, 2)
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second).double()
    x = torch.zeros(4, 2, 8, 8)
    before = path_norms(model, ORDERS, x)
    scale = torch.exp(2 * torch.randn(6, dtype=torch.float64))
    with torch.no_grad():
        first.weight.mul_(scale.view(-1, 1, 1, 1))
        first.bias.mul_(scale)
        second.weight.div_(scale.view(1, -1, 1, 1))
    after = path_norms(model, ORDERS, x)
    for p in ORDERS:
        assert after[p] == pytest.approx(before[p], rel=RIGHT)
    with torch.no_grad():
        first.weight[0] *= 1.5
    assert abs(rewrite.path_norm(model, 2, x) / before[2.0] - 1) > 1e-6


# -- what is refused ------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torch.tanh, "tanh is not positively homogeneous"),
        (F.relu6, "relu6 is not positively homogeneous"),
        (lambda x: x * x, "second degree"),
        (lambda x: 1 / x, "divides by a computed value"),
        (lambda x: F.layer_norm(x, (4,)), "layer norm normalizes by statistics of its input"),
        (lambda x: torch.maximum(x, torch.zeros(())), "maximum with other arguments"),
        (lambda x: torch.add(x, x, alpha=2), "add with other arguments"),
    ],
)
def test_refuses_with_the_line(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as refused:
        rewrite.path_norm(Functional(function), 2, torch.zeros(1, 4))
    assert "test_path_norm.py:" in str(refused.value)


def test_takes_what_is_homogeneous_in_another_spelling() -> None:
    model = Functional(lambda x: torch.abs(x).neg().contiguous() / 2 - x)
    assert rewrite.path_norm(model, 1, torch.zeros(1, 4)) > 0


def test_refuses_a_hook_and_an_input_of_integers() -> None:
    model = Functional(torch.relu)
    model.first.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="forward hook"):
        rewrite.path_norm(model, 2, torch.zeros(1, 4))
    with pytest.raises(CaptureError, match=r"dtype torch\.int64"):
        rewrite.path_norm(Functional(torch.relu), 2, torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("p", [0, -1, math.nan])
def test_refuses_orders_that_are_none(p: float) -> None:
    with pytest.raises(OptionError, match="pass a number > 0"):
        rewrite.path_norm(Functional(torch.relu), p, torch.zeros(1, 4))


def test_says_when_the_sum_overflows() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e60)
    with pytest.raises(OptionError, match="overflows float64"):
        rewrite.path_norm(model, 2, torch.zeros(1, 4))


def test_by_region_gives_the_parts_that_have_one() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model = nn.Sequential(stem, head)
    rows = {row.name: row for row in path_norms_by_region(model, (2,), torch.zeros(1, 1, 4, 4))}
    assert rows[""].norms == {} and "layer norm" in rows[""].reason
    assert rows["0"].norms[2] == rewrite.path_norm(stem, 2, torch.zeros(1, 1, 4, 4))
    assert rows.keys() == {"", "0"}


class Sized(nn.Module):
    """Sizes that the forward computes: padding before a maximum, and an image of the input's."""

    def __init__(self, computed: bool, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.computed, self.before, self.after = computed, before, after

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:] if self.computed else (5, 5)
        more = x.shape[-1] % 2 if self.computed else 1
        y = torch.relu(self.before(x))
        y = F.pad(y, (more, 0, 0, more), value=-math.inf)
        y = F.max_pool2d(y, 2)
        y = F.pad(y, [0, more, more, 0])
        y = F.interpolate(self.after(y), size=size, mode="bilinear", align_corners=False)
        return F.interpolate(y, size, mode="nearest")


def test_a_computed_size_is_the_number_that_it_is() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)
    x = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    computed, fixed = (Sized(c, *layers).double().eval() for c in (True, False))
    assert computed(x).shape == (1, 2, 5, 5)
    found, expected = path_norms(computed, ORDERS, x), path_norms(fixed, ORDERS, x)
    assert found == expected and all(map(math.isfinite, found.values()))


class LowestPad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), value=-math.inf)


def test_padding_with_the_lowest_value_before_a_maximum_is_no_path() -> None:
    torch.manual_seed(0)
    conv, pool = nn.Conv2d(2, 3, 1).double(), nn.MaxPool2d(2, padding=1)
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    one = path_norms(nn.Sequential(conv, nn.ReLU(), pool), ORDERS, x)
    two = path_norms(nn.Sequential(conv, nn.ReLU(), LowestPad(), nn.MaxPool2d(2)), ORDERS, x)
    assert one == pytest.approx(two, rel=RIGHT)


def test_a_size_that_the_input_decides_is_refused_with_the_line() -> None:
    class Decided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.conv(x), (1, 0), value=x.amax())

    with pytest.raises(CaptureError, match=r"test_path_norm\.py:"):
        rewrite.path_norm(Decided(), 2, torch.zeros(1, 2, 4, 4))


class Halves(nn.Module):
    """A view of what relu makes of a part of a value."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv, self.last = nn.Conv2d(2, 3, 1), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        half = torch.relu(self.conv(x).chunk(2, 2)[0])
        return self.last(getattr(half, self.name)(-1, 24))


def test_a_view_of_a_part_is_that_of_a_copy_of_it() -> None:
    torch.manual_seed(0)
    viewed, copied = Halves("view").double(), Halves("reshape").double()
    copied.load_state_dict(viewed.state_dict())
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    assert viewed(x).shape == (1, 2)
    assert rewrite.path_norm(viewed, 2, x) == rewrite.path_norm(copied, 2, x) > 0
