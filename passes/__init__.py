"""The passes that come with the toolkit, one file each."""

from __future__ import annotations

__all__ = [
    "BatchNormToGroupNorm",
    "BatchNormToInstanceNorm",
    "BatchNormToLayerNorm",
    "BatchNormToSyncBatchNorm",
    "BatchNormToWeightNorm",
    "FoldNorm",
    "FreezeBatchNorm",
    "MergeBranches",
    "RecalibrateBatchNorm",
    "Reinitialize",
    "RemoveWeightNorm",
    "SyncBatchNormToBatchNorm",
    "WeightNorm",
]
