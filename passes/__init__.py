"""The passes that come with the toolkit, one file each."""

from passes.bn_to_gn import BatchNormToGroupNorm
from passes.bn_to_in import BatchNormToInstanceNorm
from passes.bn_to_ln import BatchNormToLayerNorm
from passes.fold import FoldNorm

__all__ = ["BatchNormToGroupNorm", "BatchNormToInstanceNorm", "BatchNormToLayerNorm", "FoldNorm"]
