"""The architectures that the benchmarks run over: what the installed packages build offline.

A name is `package:architecture`: `timm:resnet50`, `torchvision:raft_small`,
`transformers:levit`, `smp:unet/resnet18`, `pytorchcv:darts`.

    model, example_inputs = build("timm:resnet50")

Weights are random (`fill`), norms have random statistics and a random affine map, the model is in
eval mode, and `example_inputs` are the smallest of the usual sizes on which it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.corpus.fill import SkipRandomInit, fill

__all__ = [
    "PACKAGES",
    "QUICK",
    "UnbuildableError",
    "build",
    "construct",
    "fill",
    "fit_inputs",
    "installed",
    "make",
    "names",
]

PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "smp": "segmentation_models_pytorch",
    "transformers": "transformers",
    "pytorchcv": "pytorchcv",
}
"""The prefix of a name, and the package that it stands for."""

QUICK = (
    "timm:resnet18",
    "timm:resnetv2_50",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_small_050",
    "timm:mobilenetv4_conv_small_035",
    "timm:mobilevit_xxs",
    "timm:nasnetalarge",
    "timm:densenet121",
    "timm:dla34",
    "timm:dpn48b",
    "timm:res2net50_14w_8s",
    "timm:skresnet18",
    "timm:resnest14d",
    "timm:regnety_002",
    "timm:repvgg_a0",
    "timm:mobileone_s0",
    "timm:fastvit_t8",
    "timm:efficientformer_l1",
    "timm:levit_128s",
    "timm:coatnet_pico_rw_224",
    "timm:halonet26t",
    "timm:botnet26t_256",
    "timm:lambda_resnet26t",
    "timm:hrnet_w18_small",
    "timm:vgg11_bn",
    "timm:ghostnet_050",
    "timm:inception_v4",
    "timm:tiny_vit_5m_224",
    "timm:convnext_atto",
    "torchvision:googlenet",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:deeplabv3_resnet50",
    "torchvision:fasterrcnn_resnet50_fpn_v2",
    "torchvision:ssdlite320_mobilenet_v3_large",
    "torchvision:r3d_18",
    "torchvision:raft_small",
    "torchvision:quantized_mobilenet_v2",
    "torchvision:int8_resnet18",
    "smp:unetplusplus/resnet18",
    "smp:deeplabv3plus/timm-efficientnet-b0",
    "transformers:resnet",
    "transformers:mobilevit",
    "transformers:detr",
    "transformers:patchtst",
    "transformers:wav2vec2-conformer",
    "pytorchcv:darts",
    "pytorchcv:quartznet5x5_en_ls",
    "pytorchcv:seresnet10",
)


class UnbuildableError(Exception):
    """An architecture that its package cannot build or run here; the message says why."""


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the model called `name` as `make` does, and inputs on which it runs.

    Raises:
        UnbuildableError: it cannot be built offline, or runs on none of the usual inputs.
    """
    model = make(name)
    return model, fit_inputs(name, model)


def make(name: str) -> nn.Module:
    """Return the model called `name` with random weights and norms, in eval mode.

    Raises:
        UnbuildableError: the package cannot build it offline.
    """
    model = construct(name)
    fill(model)
    return model


def construct(name: str, device: str = "cpu") -> nn.Module:
    """Return the model called `name` in eval mode, its random weights left as memory was found.

    Raises:
        UnbuildableError: the package cannot build it offline.
    """
    source, architecture = _source(name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device(device), SkipRandomInit():
                model: nn.Module = source.make(architecture)
        except Exception as error:
            raise UnbuildableError(f"{type(error).__name__}: {error}") from error
    return model.eval()


def fit_inputs(name: str, model: nn.Module) -> tuple[Any, ...]:
    """Return the first candidate inputs of the package on which `model` runs.

    Raises:
        UnbuildableError: it runs on none of them.
    """
    source, architecture = _source(name)
    failure: Exception | None = None
    for example_inputs in source.candidates(architecture, model):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(*example_inputs)
        except Exception as error:  # noqa: BLE001 - the next size may fit; the last error is raised
            failure = error
        else:
            return tuple(example_inputs)
    raise UnbuildableError(f"runs on none of the usual inputs: {type(failure).__name__}: {failure}")


def installed(name: str) -> bool:
    """Return whether the package of an architecture can be imported."""
    package = PACKAGES.get(name.partition(":")[0])
    return package is None or importlib.util.find_spec(package) is not None


def names(package: str) -> Iterator[str]:
    """Yield every architecture of `package`, prefixed with it."""
    for architecture in _module(package).architectures():
        yield f"{package}:{architecture}"


def _source(name: str) -> tuple[ModuleType, str]:
    package, _, architecture = name.partition(":")
    if package not in PACKAGES or not architecture:
        raise ValueError(f"{name!r} is not PACKAGE:ARCHITECTURE; packages: {', '.join(PACKAGES)}")
    return _module(package), architecture


def _module(package: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.corpus.{package}_source")
