"""Random chains of operations around a norm, drawn by hypothesis: what folding is held to.

    layer -> operations -> norm -> operations -> layer        all in float64

An operation is drawn from a table of every one that the toolkit knows, in several spellings, and of
some that it does not; one that does not fit the shape of the value is left out. The first layer's
output is kept, for operations that take two values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import models

Step = Callable[["Chain", Tensor, Tensor], Tensor]


class Chain(nn.Module):
    """A sequence of steps; each is given the model, the value and the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.names: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.layers[0](x)
        for step in self.steps:
            x = step(self, x, kept)
        return x


def _layer(make: Callable[[Tensor], nn.Module]) -> Callable[[Chain, Tensor], Step]:
    def build(chain: Chain, sample: Tensor) -> Step:
        place = len(chain.layers)
        module = models.randomize_norms_(make(sample)).double().eval()
        module(sample)
        chain.layers.append(module)
        return lambda m, x, h: m.layers[place](x)

    return build


def _constant(
    function: Callable[[Tensor, Tensor], Tensor], axis: int = 1
) -> Callable[[Chain, Tensor], Step]:
    """Return the builder of a step that takes a parameter with one value per channel."""

    def build(chain: Chain, sample: Tensor) -> Step:
        key = f"constant{len(chain.steps)}"
        shape = [1] * sample.dim()
        shape[axis] = sample.shape[axis]
        value = torch.rand(shape[1:], dtype=torch.float64) + 0.5
        chain.register_parameter(key, nn.Parameter(value))
        return lambda m, x, h: function(x, getattr(m, key))

    return build


def _with_indices(x: Tensor) -> Tensor:
    value, index = F.max_pool2d(x, 2, return_indices=True)
    return value + 0 * index


def _unpool(x: Tensor, h: Tensor) -> Tensor:
    index = F.max_pool2d(h, 2, return_indices=True)[1]
    return F.max_unpool2d(F.avg_pool2d(x, 2), index, 2)


def _sliced_sum(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return one + other


LAYERS: Mapping[str, Callable[[Tensor], nn.Module]] = {
    "conv 1x1": lambda x: nn.Conv2d(x.shape[1], 4, 1),
    "conv 3x3, no bias": lambda x: nn.Conv2d(x.shape[1], 4, 3, bias=False),
    "conv 3x3, padded": lambda x: nn.Conv2d(x.shape[1], 4, 3, padding=1),
    "conv, reflected": lambda x: nn.Conv2d(x.shape[1], 4, 3, padding=1, padding_mode="reflect"),
    "grouped conv": lambda x: nn.Conv2d(x.shape[1], 4, 3, padding=1, groups=2),
    "transposed conv": lambda x: nn.ConvTranspose2d(x.shape[1], 4, 2, stride=2),
    "conv1d": lambda x: nn.Conv1d(x.shape[1], 4, 1),
    "linear": lambda x: nn.Linear(x.shape[-1], 4),
}


NORMS: Mapping[str, Callable[[Tensor], nn.Module]] = {
    "batch norm 2d": lambda x: nn.BatchNorm2d(x.shape[1]),
    "batch norm 1d": lambda x: nn.BatchNorm1d(x.shape[1]),
    "batch norm without weight": lambda x: nn.BatchNorm2d(x.shape[1], affine=False),
    "layer norm": lambda x: nn.LayerNorm(x.shape[-1]),
    "rms norm": lambda x: nn.RMSNorm(x.shape[-1], eps=1e-3),
    "group norm": lambda x: nn.GroupNorm(2, x.shape[1]),
    "instance norm": lambda x: nn.InstanceNorm2d(x.shape[1], affine=True),
}


ACTIVATIONS: Mapping[str, Callable[[Tensor], nn.Module]] = {
    "PReLU": lambda x: nn.PReLU(x.shape[1]),
    "ReLU": lambda x: nn.ReLU(),
    "ReLU in place": lambda x: nn.ReLU(inplace=True),
    "MaxPool2d": lambda x: nn.MaxPool2d(2),
    "AvgPool2d": lambda x: nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": lambda x: nn.AdaptiveAvgPool2d(2),
    "Dropout": lambda x: nn.Dropout(0.5),
    "Flatten": lambda x: nn.Flatten(),
    "Identity": lambda x: nn.Identity(),
    "ZeroPad2d": lambda x: nn.ZeroPad2d(1),
    "Upsample": lambda x: nn.Upsample(scale_factor=2, mode="bilinear"),
    "PixelShuffle": lambda x: nn.PixelShuffle(2),
}


PLAIN: Mapping[str, Callable[[Tensor], Tensor]] = {
    # numbers
    "x + 1": lambda x: x + 1,
    "1 - x": lambda x: 1 - x,
    "x - 1": lambda x: x - 1,
    "2 * x": lambda x: 2 * x,
    "x / 2": lambda x: x / 2,
    "2 / x": lambda x: 2 / (x.abs() + 1),
    "-x": lambda x: -x,
    "0 + x": lambda x: 0 + x,
    "torch.add(x, 1)": lambda x: torch.add(x, 1.0),
    "torch.add(x, 1, alpha)": lambda x: torch.add(x, 1.0, alpha=3),
    "torch.add(other=)": lambda x: torch.add(x, other=1.0),
    "torch.subtract": lambda x: torch.subtract(x, 1.0),
    "torch.rsub": lambda x: torch.rsub(x, 1.0),
    "torch.multiply": lambda x: torch.multiply(x, -2.0),
    "torch.mul(other=)": lambda x: torch.mul(input=x, other=2.0),
    "torch.div(other=)": lambda x: torch.div(x, other=2.0),
    "torch.true_divide": lambda x: torch.true_divide(x, 2.0),
    "torch.divide": lambda x: torch.divide(x, -2.0),
    "div floor": lambda x: torch.div(x, 0.5, rounding_mode="floor"),
    "div_ trunc": lambda x: x.div_(0.25, rounding_mode="trunc"),
    "x // 1": lambda x: x // 0.5,
    "x % 1": lambda x: x % 1,
    "torch.neg": torch.neg,
    "torch.positive": torch.positive,
    "add_": lambda x: x.add_(1.0),
    "mul_": lambda x: x.mul_(2.0),
    "sub_": lambda x: x.sub_(1.0),
    "square": lambda x: x.square(),
    "pow": lambda x: x**2,
    # casts
    "to(dtype)": lambda x: x.to(torch.float64),
    "to(int32)": lambda x: x.to(torch.int32).to(torch.float64),
    "to(x.dtype)": lambda x: x.long().to(x.dtype),
    "int": lambda x: x.int().double(),
    "type(int)": lambda x: x.type(torch.int16).double(),
    "double": lambda x: x.double(),
    "type": lambda x: x.type(torch.float64),
    "view(dtype)": lambda x: x.view(torch.int64).double() * 1e-18,
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "round": lambda x: x.round(),
    "floor": lambda x: torch.floor(2 * x),
    "sign": torch.sign,
    # activations
    "relu": lambda x: x.relu(),
    "relu_": lambda x: torch.relu_(x),
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: torch.clamp(x, min=0),
    "softmax": lambda x: x.softmax(1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    # pooling
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d, 3x3": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max_pool1d": lambda x: F.max_pool1d(x, 3, 1, 1),
    "max_pool1d, unbatched": lambda x: F.max_pool1d(x.flatten(1), 3, 1, 1),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 3, 1, 1, count_include_pad=False),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d, padded": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool2d, ceil": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "avg_pool2d, divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_pool2d, uncounted": lambda x: F.avg_pool2d(x, 3, 1, 1, False, False),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 4),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, 2),
    "pool with indices": _with_indices,
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=4, mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad, value": lambda x: F.pad(x, (1, 1), value=2.0),
    "pad, reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad, replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "pad, circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "pad, negative": lambda x: F.pad(x, (-1, -1)),
    "nearest, size": lambda x: F.interpolate(x, size=5),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    # reductions
    "mean": lambda x: x.mean((2, 3)),
    "mean(keepdim)": lambda x: torch.mean(x, dim=[2, 3], keepdim=True),
    "mean channels": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum, int": lambda x: (2 * x).sum(-1, dtype=torch.int64).double(),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "amin": lambda x: torch.amin(x, -1),
    "max(dim)": lambda x: x.max(-1)[0],
    "var": lambda x: x.var(-1, unbiased=False),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum, last axis": lambda x: torch.cumsum(x, dim=-1),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "masked_fill, value": lambda x: x.masked_fill(x < 0, 1.0),
    "masked_fill_": lambda x: x.masked_fill_(x < 0, 0.5),
    "where, number": lambda x: torch.where(x > 0, x, 0.0),
    # axes
    "flatten": lambda x: x.flatten(1),
    "flatten(2)": lambda x: torch.flatten(x, start_dim=2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute back": lambda x: torch.permute(x, (0, 3, 1, 2)),
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: torch.swapaxes(x, 1, -1),
    "swapdims": lambda x: torch.swapdims(x, 1, 2),
    "movedim": lambda x: x.movedim(1, -1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x.squeeze(-1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], x.shape[1], -1),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "roll": lambda x: torch.roll(x, 1, -1),
    "roll channels": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(-1),
    "flip channels": lambda x: torch.flip(x, (1,)),
    "flip two": lambda x: x.flip(1, -1),
    "roll two": lambda x: x.roll((1, 2), (1, -1)),
    "roll all": lambda x: x.roll(1),
    "einsum, transposed": lambda x: torch.einsum("nchw->ncwh", x),
    "einsum, summed": lambda x: torch.einsum("nchw->nc", x),
    "einsum, channels": lambda x: torch.einsum("nchw->nhw", x),
    "unfold": lambda x: F.unfold(x, 2),
    "x.unfold": lambda x: x.unfold(-1, 2, 1),
    "x.unfold, channels": lambda x: x.unfold(1, 2, 1),
    "shuffled there and back": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    # slicing
    "x[:, ::2]": lambda x: x[:, ::2],
    "x[:, 1:]": lambda x: x[:, 1:],
    "x[..., :-1]": lambda x: x[..., :-1],
    "x[:, [1, 0]]": lambda x: x[:, [1, 0]],
    "x[:, 0]": lambda x: x[:, 0],
    "index_select": lambda x: torch.index_select(x, 1, torch.tensor([1, 0])),
    "index_select, last axis": lambda x: x.index_select(-1, torch.tensor([0, 2])),
    "chunk and cat": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split and cat": lambda x: torch.cat(list(torch.split(x, 1, 1)), 1),
    "unbind and stack": lambda x: torch.stack(x.unbind(1), 1),
    "unbind, channels": lambda x: x.unbind(1)[1],
    "stack and unbind": lambda x: torch.stack([x, 2 * x], 1).unbind(1)[1],
    "x[:, None]": lambda x: x[:, None],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select": lambda x: torch.select(x, -1, 0),
    "chunk": lambda x: x.chunk(2, 1)[0],
    "chunk and add": _sliced_sum,
    "split": lambda x: torch.split(x, 2, dim=1)[-1],
    "tensor_split": lambda x: x.tensor_split(3, 1)[1],
    "unbind": lambda x: x.unbind(-1)[0],
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: torch.tile(x, (2,)),
    "expand": lambda x: x.unsqueeze(0).expand(2, -1, -1, -1, -1)[1],
    "cat twice": lambda x: torch.cat([x, x], 1),
    "cat, axis": lambda x: torch.concat([x, 2 * x], axis=-1),
    "stack": lambda x: torch.stack([x, -x], 1).amax(1),
}


TWO: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + h": lambda x, h: x + h,
    "h + x": lambda x, h: torch.add(h, x),
    "x += h": lambda x, h: x.add_(h),
    "x - h": lambda x, h: x - h,
    "h - x": lambda x, h: h - x,
    "rsub(x, h)": lambda x, h: torch.rsub(x, h),
    "x + 2h": lambda x, h: torch.add(x, h, alpha=2),
    "x - 2h": lambda x, h: x.sub(h, alpha=2),
    "x * h": lambda x, h: x * h,
    "gate": lambda x, h: torch.sigmoid(h) * x,
    "x / |h|": lambda x, h: torch.divide(x, h.abs() + 1),
    "maximum": torch.maximum,
    "cat": lambda x, h: torch.cat([x, h], dim=1),
    "cat before": lambda x, h: torch.concatenate((h, x), 1),
    "type_as": lambda x, h: x.type_as(h),
    "expand_as": lambda x, h: x.expand_as(h),
    "reshape_as": lambda x, h: x.reshape_as(h),
    "unpool": _unpool,
    "zeros_like": lambda x, h: x + torch.zeros_like(h),
    "full_like": lambda x, h: x + torch.full_like(h, 0.5),
    "squeeze-excite": lambda x, h: x * h.mean((2, 3), keepdim=True).sigmoid(),
    "spatial gate": lambda x, h: x * h.mean(1, keepdim=True),
    "where": lambda x, h: torch.where(h > 0, x, 0.5 * x),
    "lerp": lambda x, h: torch.lerp(x, h, 0.3),
    "lerp(h, x)": lambda x, h: torch.lerp(h, x, 0.3),
    "lerp by h": lambda x, h: torch.lerp(x, 2 * x, h),
    "where, other": lambda x, h: torch.where(h > 0, x, h),
    "masked_fill by h": lambda x, h: x.masked_fill(h > 0, 0.5),
    "addcmul(x, h, h)": lambda x, h: torch.addcmul(x, h, h),
    "addcmul(h, x, h)": lambda x, h: torch.addcmul(h, x, h, value=0.5),
    "addcdiv(h, x, h)": lambda x, h: torch.addcdiv(h, x, h.abs() + 1),
    "einsum, two": lambda x, h: torch.einsum("nchw,nchw->nchw", x, h),
    "einsum, product": lambda x, h: torch.einsum("nchw,nciw->nchi", x, h),
    "stack two": lambda x, h: torch.stack([x, h], 2).sum(2),
}


CONSTANTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * c": lambda x, c: x * c,
    "c * x": lambda x, c: c * x,
    "x + c": lambda x, c: x + c,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x / c": lambda x, c: x / c,
    "c / x": lambda x, c: c / (x.abs() + 1),
    "torch.multiply(x, c)": torch.multiply,
    "torch.mul(other=c)": lambda x, c: torch.mul(x, other=c),
    "x.mul(c)": lambda x, c: x.mul(c),
    "x.mul_(c)": lambda x, c: x.mul_(c),
    "torch.add(x, c, alpha)": lambda x, c: torch.add(x, c, alpha=2),
    "torch.subtract(x, c)": torch.subtract,
    "torch.sub(x, c, alpha)": lambda x, c: torch.sub(x, c, alpha=0.5),
    "torch.rsub(x, c)": torch.rsub,
    "torch.div(x, c, floor)": lambda x, c: torch.div(x, c, rounding_mode="floor"),
    "torch.true_divide(x, c)": torch.true_divide,
    "torch.divide(other=c)": lambda x, c: torch.divide(x, other=c),
    "addcmul": lambda x, c: torch.addcmul(x, x, c),
    "addcmul(c, c, x)": lambda x, c: torch.addcmul(c, c, x),
    "addcmul(c, x, c, value)": lambda x, c: torch.addcmul(c, x, c, value=-2),
    "addcmul(x, c, c)": lambda x, c: x.addcmul(c, c),
    "addcmul_(c, c)": lambda x, c: x.addcmul_(c, c, value=0.5),
    "addcmul(c, x, x)": lambda x, c: torch.addcmul(c, x, x),
    "addcdiv(c, x, c)": lambda x, c: torch.addcdiv(c, x, c, value=2),
    "addcdiv(x, c, x)": lambda x, c: torch.addcdiv(x, c, x.abs() + 1),
    "lerp(x, c)": lambda x, c: torch.lerp(x, c, 0.3),
    "lerp(c, x, c)": lambda x, c: torch.lerp(c, x, c),
    "lerp(c, c, x)": lambda x, c: torch.lerp(c, 2 * c, x),
    "einsum by c": lambda x, c: torch.einsum("nchw,c->nchw", x, c.flatten()),
    "where, c": lambda x, c: torch.where(x > 0, x, c),
    "masked_fill by c": lambda x, c: x.masked_fill(c > 1, 0.0),
    "x * int(c)": lambda x, c: x * (4 * c).to(torch.int32).to(torch.float64),
    "x * c.view": lambda x, c: x * c.view(-1, 1, 1),
}


Builder = Callable[[Chain, Tensor], Step]


def _table() -> dict[str, Builder]:
    table: dict[str, Builder] = {}
    for name, make in ACTIVATIONS.items():
        table[name] = _layer(make)
    for name, plain in PLAIN.items():
        table[name] = lambda chain, x, f=plain: lambda m, y, h: f(y)  # type: ignore[misc]
    for name, two in TWO.items():
        table[name] = lambda chain, x, f=two: lambda m, y, h: f(y, h)  # type: ignore[misc]
    for name, constant in CONSTANTS.items():
        table[name] = _constant(constant)
    table["x * c, last axis"] = _constant(lambda x, c: x * c, axis=-1)
    return table


OPERATIONS = _table()


_NORMS = {name: _layer(make) for name, make in NORMS.items()}
_LAYERS = {name: _layer(make) for name, make in LAYERS.items()}
PATTERN: tuple[tuple[Mapping[str, Builder], int], ...] = (
    (OPERATIONS, 3), (_NORMS, 1), (OPERATIONS, 2), (_LAYERS, 1), (OPERATIONS, 2), (_NORMS, 1),
    (OPERATIONS, 1), (_LAYERS, 1),
)  # fmt: skip
"""What is drawn, and at most how often: at least one of each."""


def around_norm(operation: str, before: bool) -> Chain:
    """Return one operation between a norm and the only layer that can absorb its map.

    That is the layer before the norm (a shift cannot go into a padded one behind it), or the one
    behind the norm.
    """
    torch.manual_seed(0)
    sample = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    chain = Chain()
    with torch.no_grad():
        chain.layers.append(LAYERS["conv 3x3, padded"](sample).double())
        chain.names.append("conv 3x3, padded")
        layers = ["conv 1x1", "conv1d", "linear"]
        ahead = [[operation], list(_NORMS), ["relu"], ["conv 3x3, padded", "sigmoid"]]
        for candidates in ahead if before else [["sigmoid"], list(_NORMS), [operation], layers]:
            for name in candidates:
                length = len(chain.names)
                _append(chain, name, {**OPERATIONS, **_NORMS, **_LAYERS}[name], sample)
                if len(chain.names) > length:
                    break
    return chain.eval()


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Draw a model of (N, 3, 6, 6) float64 inputs whose norms have random statistics."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    sample = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    chain = Chain()
    with torch.no_grad():
        first = draw(st.sampled_from(["conv 1x1", "conv 3x3, no bias", "conv 3x3, padded"]))
        chain.layers.append(LAYERS[first](sample).double().eval())
        chain.names.append(first)
        for kinds, most in PATTERN:
            for _ in range(draw(st.integers(min(most, 1), most))):
                name = draw(st.sampled_from(sorted(kinds)))
                _append(chain, name, kinds[name], sample)
    return chain.eval()


def _append(chain: Chain, name: str, build: Builder, sample: Tensor) -> None:
    """Add a step if the value at the end of the chain has a shape that it takes."""
    layers, parameters = len(chain.layers), dict(chain._parameters)
    try:
        chain.steps.append(build(chain, chain(sample.clone())))
        result = chain(sample.clone())
        chain(torch.cat([sample, sample[:1]]))
    except (RuntimeError, IndexError, ValueError, TypeError, UserWarning):
        fits = False
    else:
        fits = 0 < result.numel() < 4000 and bool(result.isfinite().all())
    if fits:
        chain.names.append(name)
        return
    del chain.steps[len(chain.names) - 1 :]
    del chain.layers[layers:]
    chain._parameters = parameters
