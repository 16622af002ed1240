"""Residual branches by the graph: what is found, and that zero tails switch them off."""

import pytest
import torch
from torch import nn

import models
from passes import Reinitialize
from rewrite.graph.capture import capture
from rewrite.init.residual import residual_branches
from rewrite.pipeline import convert


def branches(model):
    return residual_branches(capture(model))


class Block(nn.Module):
    """`form` says how the branch comes back to the shortcut."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.down = nn.Conv2d(4, 4, 1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.gate = nn.Conv2d(4, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.scale, self.shift = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        forms = {
            "identity": lambda: x + self.norm(self.one(x)),
            "inplace": lambda: self.norm(self.one(x)).add_(x),
            "projection": lambda: self.down(x) + self.norm(self.two(self.one(x).relu())),
            "no norm": lambda: self.two(self.one(x).relu()) + x,
            "gated": lambda: self._gated(self.norm(self.one(x))) + x,
            "scaled": lambda: x + self.scale * self.two(self.one(x)),
            "summed": lambda: x + self.norm(self.one(x)) + self.two(x),
            "activated": lambda: x + self.norm(self.one(x)).relu(),
            "learned scale alone": lambda: x + self.scale * (self.norm(x).sigmoid()),
            "separable": lambda: self.down(self.depthwise(x)) + self.norm(self.two(self.one(x))),
            "difference": lambda: x + self._difference(self.norm(x)),
            "scaled difference": lambda: x + self.scale.view(4, 1, 1) * self._difference(x),
            "scaled in place": lambda: self._scaled_in_place(self.one(x).sigmoid()) + x,
            "computed weight": lambda: self._computed(x, self.scale.view(4, 1, 1, 1)) + x,
            "standardized weight": lambda: self._computed(x, None) + x,
            "shifted": lambda: x + (self.norm(self.one(x)).relu() * self.scale + self.shift),
            "attention": lambda: x + self._attention(self.one(x), self.two(x)),
            "python sum": lambda: x + sum([self.norm(self.one(x))]),
            "windowed": lambda: x.view(x.shape[0], 4, 6, 6) + self.norm(self.one(x)),
            "interpolated": lambda: x + self.scale.sigmoid() * (self.norm(self.one(x)) - x),
            # No residuals:
            "attention terms": lambda: x @ x.mT + self.two(self.one(x)),
            "sum of equals": lambda: self.one(x) + self.two(x),
            "constant": lambda: self.one(x) + self.scale,
            "split": lambda: self._split(x),
            "pyramid": lambda: self.down(x) + nn.functional.interpolate(self._coarse(x), (6, 6)),
            "sigmoid": lambda: x + self.one(x).sigmoid(),
        }
        return forms[self.form]()

    def _gated(self, y):
        return y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()

    def _difference(self, y):
        return nn.functional.avg_pool2d(y, 3, 1, 1) - y

    def _scaled_in_place(self, y):
        y.mul_(self.scale)
        return y

    def _computed(self, x, gain):
        flat = self.one.weight.reshape(1, 4, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True).view(4, 4, 3, 3)
        weight = weight if gain is None else weight * gain
        return nn.functional.conv2d(x, weight, None, padding=1)

    def _attention(self, q, v):
        q, v = q.flatten(2), v.flatten(2)
        return ((q @ q.mT).softmax(-1) @ v).reshape(2, 4, 6, 6)

    def _split(self, x):
        left, right = x.chunk(2, 1)
        return self.one(torch.cat([left, left], 1))[:, :2] + right

    def _coarse(self, x):
        return self.two(self.one(nn.functional.avg_pool2d(x, 2)))


@pytest.mark.parametrize(
    "form", ["sum of equals", "constant", "split", "pyramid", "attention terms"]
)
def test_sums_that_are_no_residuals(form):
    assert branches(Block(form)) == []


def test_chain_of_blocks():
    model = nn.Sequential(*[Block("identity") for _ in range(4)])
    found = branches(model)
    assert [b.target for b in found] == ["0", "1", "2", "3"]
    assert [b.layers[0].name for b in found] == [f"{i}.one.weight" for i in range(4)]


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("residual", 1, "norm"), ("pre_activation", 1, "weight"), ("squeeze_excite", 1, "norm")],
)
def test_models_of_the_corpus(name, count, kind):
    model, _ = models.build(name)
    found = branches(model)
    assert len(found) == count
    assert {tail.kind for branch in found for tail in branch.tails} == {kind}


def test_layers_of_torch_that_add_by_themselves():
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    ).eval()
    found = branches(model)
    assert [b.tails[0].weight.name for b in found] == [
        "0.self_attn.out_proj.weight",
        "0.linear2.weight",
    ]
    zeroed = convert(model, [Reinitialize(residual="zero")], verify=False).model
    x = torch.randn(2, 5, 8)
    assert torch.equal(zeroed(x), x)
    decoder = nn.TransformerDecoderLayer(8, 2, 16)
    assert len(branches(nn.ModuleList([decoder]))) == 3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 8),
        ("resnetv2_50", 16),
        ("convnext_atto", 12),
        ("regnety_002", 13),
        ("mobilenetv3_small_050", 7),
        ("repvgg_a0", 17),
        ("vit_tiny_patch16_224", 24),
        ("mixer_s32_224", 16),
        ("densenet121", 0),
        ("nf_resnet26", 8),
        ("ghostnet_050", 16),
        ("hiera_tiny_224", 24),
        ("poolformerv2_s12", 24),
    ],
)
def test_families_of_timm(name, count):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    found = branches(model)
    assert len([b for b in found if b.tails]) == count
    assert all(b.tails for b in found)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 8), ("swin_t", 24), ("swin3d_t", 24), ("vit_b_16", 24)]
)
def test_families_of_torchvision(name, count):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    found = branches(model)
    assert len(found) == count
    assert all(b.tails for b in found)
