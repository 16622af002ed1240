"""Fold one checkpoint, and then another of the same network by the report of the first.

The second fold needs no code of the network: the report says which tensors take which maps.
"""

import json

import torch

import rewrite
from models.digits_resnet import CHECKPOINT
from models.randomize import randomize_norms_
from rewrite.fold.replay import apply_report

x = torch.randn(4, 1, 8, 8)
first = rewrite.convert(rewrite.load(CHECKPOINT).eval(), ["fold"], example_inputs=(x,))
report = json.loads(first.report.to_json())

second = randomize_norms_(rewrite.load(CHECKPOINT)).eval()  # as if it were trained further
first.model.load_state_dict(apply_report(report, second.state_dict()))
with torch.inference_mode():
    error = (first.model(x) - second(x)).abs().max() / second(x).abs().max()
print(f"largest relative error of the second fold: {error:.1e}")
assert error < 1e-4
