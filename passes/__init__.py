"""The passes that come with the toolkit, one file each."""

from passes.bn_to_gn import BatchNormToGroupNorm
from passes.bn_to_in import BatchNormToInstanceNorm
from passes.bn_to_ln import BatchNormToLayerNorm
from passes.bn_to_sync_bn import BatchNormToSyncBatchNorm
from passes.bn_to_weight_norm import BatchNormToWeightNorm
from passes.clip_channels import ClipChannels
from passes.fold import FoldNorm
from passes.freeze_bn import FreezeBatchNorm
from passes.ln_to_rms import LayerNormToRMSNorm
from passes.merge_branches import MergeBranches
from passes.out_of_place import OutOfPlace
from passes.rebalance import Rebalance
from passes.recalibrate_bn import RecalibrateBatchNorm
from passes.reinit import Reinitialize
from passes.remove_standardize import RemoveStandardize
from passes.remove_weight_norm import RemoveWeightNorm
from passes.rotate_stream import RotateStream
from passes.sync_bn_to_bn import SyncBatchNormToBatchNorm
from passes.weight_norm import WeightNorm
from passes.weight_standardize import WeightStandardize

__all__ = [
    "BatchNormToGroupNorm",
    "BatchNormToInstanceNorm",
    "BatchNormToLayerNorm",
    "BatchNormToSyncBatchNorm",
    "BatchNormToWeightNorm",
    "ClipChannels",
    "FoldNorm",
    "FreezeBatchNorm",
    "LayerNormToRMSNorm",
    "MergeBranches",
    "OutOfPlace",
    "Rebalance",
    "RecalibrateBatchNorm",
    "Reinitialize",
    "RemoveStandardize",
    "RemoveWeightNorm",
    "RotateStream",
    "SyncBatchNormToBatchNorm",
    "WeightNorm",
    "WeightStandardize",
]
