"""Weight norm on every layer: value, gradients, files, ties, and back."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

from rewrite.checkpoint.load import load, save
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.runtime.copying import copy_model
from rewrite.weights.layout import Layout
from rewrite.weights.weight_norm import (
    add_weight_norm,
    convert_old_weight_norm,
    has_weight_norm,
    remove_weight_norm,
    share_weight_norm,
    weight_layouts,
    weight_normed,
)

LAYERS = {
    "linear": lambda: nn.Linear(10, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 4, 2, groups=2),
    "embedding": lambda: nn.Embedding(7, 5),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "rnn": lambda: nn.RNN(3, 4),
    "gru": lambda: nn.GRU(3, 4, 2),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    "cell": lambda: nn.LSTMCell(3, 4),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "attention apart": lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=5),
}


def normed(layer: nn.Module) -> nn.Module:
    for name, layout in weight_layouts(layer).items():
        add_weight_norm(TensorWriter(), layer, name, layout)
    return layer


def old_style(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("kind", LAYERS)
def test_added_and_removed_bit_for_bit(kind, dtype):
    layer = LAYERS[kind]().to(dtype)
    with torch.no_grad():
        for name in weight_layouts(layer):
            getattr(layer, name)[0] = 0  # a zero row (of inputs, for a transposed convolution)
    before = copy.deepcopy(layer.state_dict())
    assert weight_layouts(layer)
    normed(layer)
    for name in weight_layouts(LAYERS[kind]()):
        assert has_weight_norm(layer, name)
        assert torch.equal(getattr(layer, name), before[name])
        assert all(p.dtype == dtype for p in layer.parametrizations[name].parameters())
        remove_weight_norm(TensorWriter(), layer, name)
    assert type(layer) is type(LAYERS[kind]())
    assert layer.state_dict().keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)


@pytest.mark.parametrize("kind", ["transposed1d", "transposed2d", "transposed3d"])
def test_g_is_the_norm_of_each_output_of_a_transposed_convolution(kind):
    layer = LAYERS[kind]().double()
    (layout,) = weight_layouts(layer).values()
    norms = layout.units(layer.weight.detach()).flatten(2).norm(dim=-1).flatten()
    normed(layer)
    g = layer.parametrizations.weight.original0
    assert g.numel() == layer.out_channels
    torch.testing.assert_close(g.detach().flatten(), norms)
    x = torch.randn(1, layer.in_channels, *[4] * (layer.weight.dim() - 2), dtype=torch.float64)
    bias = layer.bias.detach().reshape(-1, *[1] * (x.dim() - 2))
    before = layer(x) - bias
    factor = torch.arange(1.0, layer.out_channels + 1, dtype=torch.float64)
    with torch.no_grad():
        g.mul_(factor.reshape(g.shape))
    torch.testing.assert_close(layer(x) - bias, before * factor.reshape(bias.shape))


def test_torch_differs_where_we_do_not():
    """The reasons for a parametrization of our own; if one goes, so can it."""
    layer = nn.Linear(1000, 50)
    weight = layer.weight.detach().clone()
    assert not torch.equal(torch_weight_norm(copy.deepcopy(layer)).weight, weight)
    assert torch.equal(normed(copy.deepcopy(layer)).weight, weight)
    with torch.no_grad():
        layer.weight[3] = 0
    assert torch_weight_norm(copy.deepcopy(layer)).weight[3].isnan().all()
    assert not normed(layer).weight[3].any()


def test_same_keys_and_shapes_as_torch():
    for layer in (nn.Linear(3, 4), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(5, 3)):
        theirs = torch_weight_norm(copy.deepcopy(layer))
        ours = normed(layer)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_tied_weights_stay_tied():
    first, second = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    add_weight_norm(TensorWriter(), first, "weight", Layout())
    share_weight_norm(TensorWriter(), first, "weight", second, "weight")
    assert len(list(model.parameters())) == 2
    copied = copy.deepcopy(model)
    assert len(list(copied.parameters())) == 2
    with torch.no_grad():
        copied[0].parametrizations.weight.original0.mul_(3)
    assert torch.equal(copied[0].weight, copied[1].weight)
    assert not torch.allclose(copied[0].weight, first.weight)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_recurrent_layers_follow_their_weights(kind):
    layer = LAYERS[kind]()
    x = torch.randn(5, 2, 3)
    before = layer(x)[0]
    normed(layer)
    assert torch.equal(layer(x)[0], before)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.parametrizations.weight_ih_l0.original0.mul_(2)
    assert not torch.allclose(layer(x)[0], before, rtol=1e-3)
    assert torch.equal(copied(x)[0], before)
    doubled = layer.double()(x.double())[0]
    for name in weight_normed(layer):
        remove_weight_norm(TensorWriter(), layer, name)
        torch.testing.assert_close(layer(x.double())[0], doubled)
    assert type(layer) is type(LAYERS[kind]())


@pytest.mark.parametrize("kind", LAYERS)
def test_saved_and_loaded(kind, tmp_path):
    layer = normed(LAYERS[kind]())
    read = load(save(layer, tmp_path / "layer.pt"))
    for name in weight_layouts(LAYERS[kind]()):
        assert torch.equal(getattr(read, name), getattr(layer, name))
        assert has_weight_norm(read, name)
        with torch.no_grad():
            read.parametrizations[name].original0.mul_(2)
        torch.testing.assert_close(getattr(read, name), 2 * getattr(layer, name))
    assert layer.state_dict().keys() == read.state_dict().keys()
    assert len(read._load_state_dict_pre_hooks) == len(layer._load_state_dict_pre_hooks)
    if isinstance(layer, nn.RNN):
        x = torch.randn(2, 1, 3)
        assert not torch.allclose(read(x)[0], layer(x)[0], rtol=1e-3)
    for name in weight_normed(read):
        remove_weight_norm(TensorWriter(), read, name)
    assert type(read) is type(LAYERS[kind]())


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_old_style_is_removed_and_converted(dim):
    layer = old_style(nn.ConvTranspose1d(4, 6, 3), dim)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)
    x = torch.randn(2, 4, 5)
    before = layer(x)
    assert weight_normed(layer) == ("weight",)
    parameters = {id(p) for p in layer.parameters()}
    converted = copy_model(layer)  # copy.deepcopy raises on the old style
    removed = copy_model(layer)
    convert_old_weight_norm(TensorWriter(), converted, "weight")
    remove_weight_norm(TensorWriter(), removed, "weight")
    for module in (converted, removed):
        torch.testing.assert_close(module(x), before)
        assert not module._forward_pre_hooks
    assert sorted(removed.state_dict()) == ["bias", "weight"]
    assert has_weight_norm(converted, "weight")
    convert_old_weight_norm(TensorWriter(), layer, "weight")
    assert {id(p) for p in layer.parameters()} == parameters


def test_old_checkpoint_loads_into_the_new_form():
    old = old_style(nn.Linear(3, 4))
    with torch.no_grad():
        old.weight_g.mul_(2)
    new = nn.Sequential(normed(nn.Linear(3, 4)))
    new.load_state_dict({f"0.{key}": value for key, value in old.state_dict().items()})
    x = torch.randn(2, 3)
    torch.testing.assert_close(new(x), old(x))
    with pytest.raises(RuntimeError, match="weight_g"):
        state = {"0.weight_g": old.weight_g, "0.bias": old.bias}
        new.load_state_dict(state)


def test_a_copy_can_change_without_its_original():
    """A deep copy shares the class that PyTorch made for the original."""
    lstm = nn.LSTM(3, 4)
    layouts = weight_layouts(lstm)
    add_weight_norm(TensorWriter(), lstm, "weight_ih_l0", layouts["weight_ih_l0"])
    x = torch.randn(2, 1, 3)
    before = lstm(x)[0]
    copied = copy.deepcopy(lstm)
    assert type(copied) is type(lstm)
    add_weight_norm(TensorWriter(), copied, "weight_hh_l0", layouts["weight_hh_l0"])
    assert torch.equal(lstm(x)[0], before)
    assert weight_normed(lstm) == ("weight_ih_l0",)
    remove_weight_norm(TensorWriter(), copied, "weight_ih_l0")
    assert weight_normed(copied) == ("weight_hh_l0",)
    for layer in (lstm, copied):
        assert torch.equal(layer(x)[0], before)
    remove_weight_norm(TensorWriter(), copied, "weight_hh_l0")
    assert type(copied) is nn.LSTM
    assert torch.equal(lstm.weight_ih_l0, copied.weight_ih_l0)


def test_other_parametrizations_stay():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    assert weight_normed(layer) == ()
    assert parametrize.is_parametrized(layer)


def test_frozen_weights_stay_frozen():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    normed(layer)
    assert [p.requires_grad for p in layer.parametrizations.weight.parameters()] == [False, False]
    assert not remove_weight_norm(TensorWriter(), layer, "weight").requires_grad
