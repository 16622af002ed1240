"""The list of classes that a file may name without `--trust`.

    name of a file  ->  layer | instance | enum        judged as text, before anything is imported

`allowed_classes.json` comes from `python -m benchmarks.allowed_classes`, which reads the sources of
torch, torchvision, timm and transformers, and is held to what `python -m benchmarks.seen_classes`
saw of those that architectures are made of, built and run under Python's audit hooks. A layer may
be an instance, a value, and what a `functools.partial` is of; an instance may not be kept as a
class, since constructing it may fetch what its arguments say; of an enum only members are looked
up.
"""

from __future__ import annotations

import enum
import json
from functools import cache
from importlib import resources

TRUSTED = ("torch", "torchvision", "timm", "transformers", "rewrite")
"""Packages whose listed classes a checkpoint may name without `--trust`."""

MOVED = {
    "rewrite.mean_only.MeanOnlyBatchNorm": "rewrite.nn.MeanOnlyBatchNorm",
    "rewrite.modules.ChannelAffine": "rewrite.nn.ChannelAffine",
    "rewrite.modules.ChannelLayerNorm": "rewrite.nn.ChannelLayerNorm",
    "rewrite.modules.ChannelMix": "rewrite.nn.ChannelMix",
    "rewrite.parametrizations.WeightNorm": "rewrite.nn.WeightNorm",
}
"""How files of 0.1.0 name the classes of this toolkit, and what that is today."""

HOOKS = frozenset(
    {
        "torch.nn.utils.weight_norm.WeightNorm",
        "torch.nn.utils.spectral_norm.SpectralNorm",
        "torch.nn.utils.spectral_norm.SpectralNormStateDictHook",
        "torch.nn.utils.spectral_norm.SpectralNormLoadStateDictPreHook",
    }
)
"""Classes whose instances a module may have as hooks: those by which torch computes weights."""

_PLAIN = frozenset(
    {
        "torch.nn.modules.module._WrappedHook",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.detection.image_list.ImageList",
    }
)
"""Classes that are no modules, but that listed layers keep instances of."""


OWN = frozenset(
    {
        *("Centre", "ChannelAffine", "ChannelClip", "ChannelLayerNorm", "ChannelMix"),
        "MeanOnlyBatchNorm",
        *("ShiftedRMSNorm", "WeightNorm", "WeightStandardization"),
    }
)
"""The classes of `rewrite.nn`."""


class Standing(enum.Enum):
    """What a file may do with a class."""

    LAYER = "layers"
    INSTANCE = "instances"
    ENUM = "enums"


def standing(name: str) -> Standing | None:
    """Return what a file may do with the class of that name, None for one that is not listed."""
    if name.startswith("rewrite.nn."):
        return Standing.LAYER if name.removeprefix("rewrite.nn.") in OWN else None
    if name in HOOKS or name in _PLAIN:
        return Standing.INSTANCE
    module, _, last = name.rpartition(".")
    return next((kind for kind in Standing if last in _listed()[kind].get(module, ())), None)


@cache
def _listed() -> dict[Standing, dict[str, frozenset[str]]]:
    """Return the list in the package, by standing and module."""
    text = resources.files(__package__).joinpath("allowed_classes.json").read_text("utf-8")
    content = json.loads(text)
    return {
        kind: {module: frozenset(names.split()) for module, names in content[kind.value].items()}
        for kind in Standing
    }
