"""A model as one layer: gradients of each sample where layer by layer there are none."""

from __future__ import annotations

import copy

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
    assert torch.equal(layer(x), model(x))
    assert not list(layer.buffers()) and not list(layer.children())
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


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), x


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


def test_refuses_several_outputs() -> None:
    with pytest.raises(OptionError, match="returns a tuple"):
        AsOneLayer(_Two())(torch.randn(1, 2))


def test_refuses_random_numbers() -> None:
    """The second run would draw others: `vmap` says so."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    layer, x = AsOneLayer(model), torch.randn(3, 2)
    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(lambda sample: layer(sample[None]))(x)
