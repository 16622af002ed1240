"""One weight by a scheme, seeded."""

import pytest
import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.init.draw import draw, generator
from rewrite.init.schemes import parse_scheme
from rewrite.weights.fans import linear_maps
from tests.init.test_schemes import drawn


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_orthogonal_in_every_group(kind, groups):
    layer = kind(6, 12, 3, groups=groups)
    units = linear_maps(layer)[0].layout.units(drawn("orthogonal:2", layer)).flatten(2)
    rows, columns = units.shape[1:]
    gram = units @ units.mT if rows <= columns else units.mT @ units
    eye = torch.eye(min(rows, columns), dtype=torch.float64).expand_as(gram)
    torch.testing.assert_close(gram, 4 * eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_dirac_passes_channels_through(kind, groups):
    layer = kind(4, 4, 3, padding=1, groups=groups, bias=False).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    layer.weight = nn.Parameter(drawn("dirac", layer))
    assert torch.equal(layer(x), x)


def test_dirac_of_torch():
    layer = nn.Conv2d(6, 4, 3, groups=2)
    expected = nn.init.dirac_(torch.empty_like(layer.weight), groups=2).double()
    assert torch.equal(drawn("dirac", layer), expected)


def test_a_weight_does_not_depend_on_the_others():
    layer = nn.Linear(4, 4)
    again = drawn("he", layer)
    drawn("he", nn.Linear(7, 7))
    assert torch.equal(drawn("he", layer), again)
    assert not torch.equal(drawn("he", layer, seed=1), again)
    (linear_map,) = linear_maps(layer)
    other = draw(parse_scheme("he"), linear_map, layer.weight.shape, generator(0, "v"))
    assert not torch.equal(other, again)


@pytest.mark.parametrize(
    ("scheme", "layer", "shape", "said"),
    [
        ("orthogonal", nn.Linear(3, 3), (3,), "rows and columns"),
        ("orthogonal", nn.Linear(3, 3), (0, 3), "rows and columns"),
        ("dirac", nn.Linear(3, 3), (3, 3), "convolution"),
        ("he", None, (3,), "linear map"),
    ],
)
def test_shapes_that_have_none(scheme, layer, shape, said):
    linear_map = linear_maps(layer)[0] if layer is not None else None
    with pytest.raises(OptionError, match=said):
        draw(parse_scheme(scheme), linear_map, torch.Size(shape), generator(0, "w"))
