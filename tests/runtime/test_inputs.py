from __future__ import annotations

import torch
from torch import nn

from rewrite.runtime.inputs import batches_for
from rewrite.runtime.leaves import tensors


def test_labels_beside_the_inputs_are_left_out():
    batch = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    assert len(tensors(list(batches_for(nn.Linear(3, 1), batch).args))) == 1
