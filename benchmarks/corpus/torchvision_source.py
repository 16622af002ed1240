"""torchvision: classification, segmentation, detection, video, optical flow, quantization.

`quantized_X` is torchvision's registered quantizable model, in float; `int8_X` is the same model
after torchvision's own preparation and conversion to int8.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, optical_flow, video
from torchvision.models.quantization.utils import quantize_model

from benchmarks.corpus.fill import fill

_INT8 = "int8_"
_DETECTORS = frozenset(models.list_models(module=detection))
_FLOW = frozenset(models.list_models(module=optical_flow))
_VIDEO = frozenset(models.list_models(module=video))


def architectures() -> Iterator[str]:
    """Yield every registered model, and the int8 conversion of each quantizable one."""
    for name in models.list_models():
        yield name
        if name.startswith("quantized_"):
            yield _INT8 + name.removeprefix("quantized_")


def make(architecture: str) -> nn.Module:
    """Build one model with random weights, backbone included."""
    if architecture.startswith(_INT8):
        return _int8("quantized_" + architecture.removeprefix(_INT8))
    options: dict[str, Any] = {"weights": None}
    accepted = inspect.signature(models.get_model_builder(architecture)).parameters
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if architecture.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    if architecture in _DETECTORS and not architecture.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 128}
    if "rcnn" in architecture:  # random weights propose boxes everywhere
        options |= {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
    return models.get_model(architecture, **options)


def _int8(quantizable: str) -> nn.Module:
    """Convert a float model to int8; its weights have to be there before that."""
    model = make(quantizable)
    fill(model)
    quantize_model(model, "fbgemm")
    return model


def candidates(architecture: str, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield the inputs of the task, from small to the size that the model was made for."""
    if architecture in _DETECTORS:
        yield ([_image(3, 128, 128)],)
    elif architecture in _FLOW:
        yield _image(1, 3, 128, 128), _image(1, 3, 128, 128)
    elif architecture in _VIDEO:
        yield (_image(1, 3, 8, 64, 64),)
        yield (_image(1, 3, 16, 224, 224),)
    else:
        for side in (64, 128, 224, 299):
            yield (_image(1, 3, side, side),)


def _image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))
