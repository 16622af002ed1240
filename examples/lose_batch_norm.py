"""Replace BatchNorm by GroupNorm, four ways, and count what each keeps of the accuracy."""

import rewrite
from models.digits_resnet import CHECKPOINT, accuracy, calibration_batches

model = rewrite.load(CHECKPOINT).eval()
found = {"BatchNorm": accuracy(model)}
ways = {
    "gamma and beta copied": "bn-to-gn{num_groups=1, keep=affine}",
    "1 group, no data": "bn-to-gn{num_groups=1}",
    "16 channels a group, no data": "bn-to-gn{channels_per_group=16}",
    "16 channels a group, 256 images": "bn-to-gn{channels_per_group=16, keep=function}",
}
for name, spec in ways.items():
    data = calibration_batches() if "function" in spec else None
    found[name] = accuracy(rewrite.convert(model, [spec], calibration=data).model)

for name, share in found.items():
    print(f"{name:32} {share:7.1%}")
assert found["gamma and beta copied"] < 0.2
assert found["16 channels a group, 256 images"] > 0.99
