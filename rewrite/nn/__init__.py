"""The only classes that a saved model may name beside torch's own.

Files name them as `rewrite.nn.NAME`, wherever in this package they are defined, so that a file
stays readable when a definition moves.
"""

from rewrite.nn.mean_only import MeanOnlyBatchNorm
from rewrite.nn.modules import ChannelAffine, ChannelClip, ChannelLayerNorm, ChannelMix
from rewrite.nn.streams import Centre, ShiftedRMSNorm
from rewrite.nn.weight_norm import WeightNorm
from rewrite.nn.weight_standardization import WeightStandardization

__all__ = [
    "Centre",
    "ChannelAffine",
    "ChannelClip",
    "ChannelLayerNorm",
    "ChannelMix",
    "MeanOnlyBatchNorm",
    "ShiftedRMSNorm",
    "WeightNorm",
    "WeightStandardization",
]

for _kind in (
    Centre,
    ChannelAffine,
    ChannelClip,
    ChannelLayerNorm,
    ChannelMix,
    MeanOnlyBatchNorm,
    ShiftedRMSNorm,
    WeightNorm,
    WeightStandardization,
):
    _kind.__module__ = __name__
