"""Small networks: a norm and dropout with a fold that shares no code with the toolkit; branches."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rewrite.runtime.copying import copy_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.head(self.drop(x).mean((2, 3)))
        return {"logits": x, "label": x.argmax(-1)}


X = (torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),)


def folded(model: nn.Module) -> nn.Module:
    copy = copy_model(model.eval())
    copy.conv, copy.norm = fuse_conv_bn_eval(copy.conv, copy.norm), nn.Identity()
    return copy


class Branches(nn.Module):
    """One layer, with another activation for what is negative: `torch.cond`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(
            x.sum() > 0, lambda x: self.linear(x).relu(), lambda x: self.linear(x).tanh(), (x,)
        )
