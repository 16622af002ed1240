"""A model as one layer: gradients of each sample where layer by layer there are none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite.errors import OptionError
from rewrite.training import AsOneLayer


class WindowAttention(nn.Module):
    """Attention in windows with a table of relative positions: a bare parameter and its index."""

    index: Tensor

    def __init__(self, width: int = 8, side: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2))
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offsets = places[:, None] - places[None] + side - 1
        self.register_buffer("index", offsets[..., 0] * (2 * side - 1) + offsets[..., 1])
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = self.side
        rows = x.view(n, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        q, k, v = self.qkv(rows).chunk(3, -1)
        weights = (q @ k.transpose(-2, -1) + self.table[self.index]).softmax(-1)
        back = (weights @ v).view(n, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4)
        return back.reshape(n, c, h, w)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), WindowAttention(),
        nn.Flatten(), nn.Linear(128, 4),
    ).double()  # fmt: skip


def _loss(output: Tensor) -> Tensor:
    return output.square().sum(1).mean()


def _single_samples(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    return [
        list(torch.autograd.grad(_loss(model(sample[None])), list(model.parameters())))
        for sample in x
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_gradients_are_those_of_single_samples(mode: str) -> None:
    pytest.importorskip("opacus")
    from opacus import PrivacyEngine
    from opacus.grad_sample.utils import prepare_module

    model, x = _model(), torch.randn(3, 3, 4, 4, dtype=torch.double)
    wanted = _single_samples(model, x)
    private = prepare_module(AsOneLayer(model), mode)
    _loss(private(x)).backward()
    for place, parameter in enumerate(model.parameters()):
        for number in range(3):
            torch.testing.assert_close(
                parameter.grad_sample[number], wanted[number][place], rtol=0, atol=1e-12
            )
    fresh = AsOneLayer(copy.deepcopy(_model())).float().train()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    trained, optimizer, _ = PrivacyEngine().make_private(
        module=fresh, optimizer=torch.optim.SGD(fresh.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )  # fmt: skip
    before = fresh.model.get_parameter("3.table").clone()
    _loss(trained(x.float())).backward()
    optimizer.step()
    assert not torch.equal(before, fresh.model.get_parameter("3.table"))


@pytest.mark.filterwarnings("ignore")
def test_layer_by_layer_it_is_refused() -> None:
    """The negative twin."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule

    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(_model())


def test_it_computes_what_the_model_does_and_follows_it() -> None:
    model, x = _model(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    layer = AsOneLayer(model)
    torch.testing.assert_close(layer(x), model(x), rtol=0, atol=1e-14)
    assert not list(layer.buffers()) and list(layer.children()) == [layer.layer]
    assert {id(p) for p in layer.parameters()} == {id(p) for p in model.parameters()}
    assert not layer.eval().model.training
    layer.float()
    assert model[0].weight.dtype == torch.float
    torch.testing.assert_close(layer(x.float()), model(x.float()))


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.fc(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1: BatchNorm1d keeps statistics"),
        (nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True)), "keeps statistics"),
        (_Counts(), "seen: the forward writes this buffer"),
    ],
)
def test_refuses_what_samples_share(model: nn.Module, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AsOneLayer(model)


class _Several(nn.Module):
    """Two inputs, and a dictionary with a tuple, a label and nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, words: Tensor, *, scale: Tensor) -> dict[str, object]:
        hidden = self.embedding(words) * scale[:, None, None]
        return {
            "hidden": (hidden, None), "logits": self.fc(hidden.mean(1)) + self.frozen,
            "rows": hidden.flatten(0, 1), "kind": "words",
        }  # fmt: skip


def _loss_of_several(output: dict[str, Any]) -> Tensor:
    hidden, logits = output["hidden"][0], output["logits"]
    return hidden.square().sum((1, 2)).mean() + logits.square().sum(1).mean()


@pytest.mark.filterwarnings("ignore")
def test_several_inputs_and_outputs() -> None:
    pytest.importorskip("opacus")
    from opacus.grad_sample.utils import prepare_module

    torch.manual_seed(0)
    model = _Several().double()
    words, scale = torch.randint(0, 5, (3, 4)), torch.randn(3, dtype=torch.double)
    private = prepare_module(AsOneLayer(model.train()), "hooks")
    output = private(words, scale=scale)
    wanted = model(words, scale=scale)
    assert output["kind"] == "words" and output["hidden"][1] is None
    for key in ("logits", "rows"):
        torch.testing.assert_close(output[key], wanted[key], rtol=0, atol=1e-14)
    _loss_of_several(output).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for number in range(3):
        one = model(words[number, None], scale=scale[number, None])
        for parameter, gradient in zip(
            trained, torch.autograd.grad(_loss_of_several(one), trained), strict=True
        ):
            torch.testing.assert_close(parameter.grad_sample[number], gradient, rtol=0, atol=1e-13)
    assert model.frozen.grad is None


@pytest.mark.filterwarnings("ignore")
def test_random_numbers_are_those_of_the_forward() -> None:
    """y = mask · (W x): the gradient of sample n must have the zeros of the mask that it saw."""
    pytest.importorskip("opacus")
    from opacus.grad_sample.utils import prepare_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40, bias=False), nn.Dropout(0.5)).double().train()
    x = torch.randn(4, 6, dtype=torch.double)
    private = prepare_module(AsOneLayer(model), "hooks")
    output = private(x)
    kept = (output != 0).double() * 2
    assert 0.3 < float(kept.mean()) / 2 < 0.7 and len(kept.unique(dim=0)) == 4
    output.sum(1).mean().backward()
    torch.testing.assert_close(
        model[0].weight.grad_sample, kept[:, :, None] * x[:, None], rtol=0, atol=1e-14
    )


class _Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.fc(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [(torch.mean, "a number for all samples"), (lambda y: (y, object()), "returns a object")],
)
def test_refuses_what_has_no_samples(function: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AsOneLayer(_Returns(function))(torch.randn(3, 2))


def test_refuses_inputs_that_disagree() -> None:
    layer = AsOneLayer(nn.Bilinear(2, 2, 2))
    with pytest.raises(OptionError, match=r"axis 0 of every input; found \(3, 2\), \(4, 2\)"):
        layer(torch.randn(3, 2), torch.randn(4, 2))


def test_refuses_a_model_that_is_frozen() -> None:
    with pytest.raises(OptionError, match="requires a gradient"):
        AsOneLayer(nn.Linear(2, 2).requires_grad_(False))
