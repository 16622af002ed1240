"""A BatchNorm ResNet for the 8x8 digits of scikit-learn, and the script that trains it.

The network is assembled from torchvision's own ``ResNet`` and ``BasicBlock``, so that the whole
pickled module in ``models/digits_resnet.pt`` names classes of torch and torchvision only, and
opens without trusting any other package.

Train it again (under a minute on two cores) and overwrite the checkpoint, and the test images
(without labels) for the command line in ``models/digits_images.npz``::

    python -m models.digits_resnet
"""

import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

CHECKPOINT = Path(__file__).with_name("digits_resnet.pt")
IMAGES = Path(__file__).with_name("digits_images.npz")
WIDTHS = (64, 96)
TEST_IMAGES = 500


def digits_resnet() -> ResNet:
    """Build the untrained network: a 3x3 stem, then one basic block at 8x8 and one at 4x4."""
    # Every stage is replaced below: torchvision fixes their widths at 64 to 512.
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    narrow, wide = WIDTHS
    model.conv1 = nn.Conv2d(1, narrow, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(narrow)
    model.maxpool = nn.Identity()
    downsample = nn.Sequential(
        nn.Conv2d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide)
    )
    model.layer1 = nn.Sequential(BasicBlock(narrow, narrow))
    model.layer2 = nn.Sequential(BasicBlock(narrow, wide, stride=2, downsample=downsample))
    model.layer3 = nn.Sequential()
    model.layer4 = nn.Sequential()
    model.fc = nn.Linear(wide, 10)
    _initialize_(model)
    return model


def load_digits_resnet() -> ResNet:
    """Read the trained network from the checkpoint, in eval mode."""
    # The file is the one of this repository, written by `main` below.
    model: ResNet = torch.load(CHECKPOINT, weights_only=False)
    return model.eval()


@cache
def _split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16.0 - 0.3).astype(np.float32)
    parts = train_test_split(images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return train_x, test_x, train_y, test_y


def training_images() -> Tensor:
    """Return the 1297 training images, without their labels."""
    return _split()[0].clone()


def held_out() -> tuple[Tensor, Tensor]:
    """Return the 500 images and labels of the fixed test split."""
    _, images, _, labels = _split()
    return images.clone(), labels.clone()


def calibration_batches(batches: int = 4, batch_size: int = 64) -> list[Tensor]:
    """Return unlabelled batches of training images, the same ones every time."""
    order = torch.randperm(len(_split()[0]), generator=torch.Generator().manual_seed(1))
    images = _split()[0][order[: batches * batch_size]]
    return [batch.clone() for batch in images.split(batch_size)]


def accuracy(model: nn.Module) -> float:
    """Return the share of the fixed test split that the model gets right, in eval mode."""
    like = next(model.parameters())
    images, labels = held_out()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            guess = model(images.to(like.device, like.dtype)).argmax(dim=1).cpu()
    finally:
        for module, training in modes.items():
            module.training = training
    return (guess == labels).double().mean().item()


def train(seed: int = 0, epochs: int = 40, batch_size: int = 64) -> ResNet:
    """Train the network from scratch, the same way every time for one seed and thread count."""
    torch.manual_seed(seed)
    model = digits_resnet()
    images, _, labels, _ = _split()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))[: len(images) // batch_size * batch_size]
        for batch in order.split(batch_size):
            loss = F.cross_entropy(
                model(_jitter(images[batch])), labels[batch], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _jitter(images: Tensor) -> Tensor:
    """Shift, rotate and scale each image a little."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.35
    scale = 1 + (torch.rand(count) - 0.5) * 0.25
    shift = (torch.rand(count, 2) - 0.5) * 0.4
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _initialize_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def main() -> None:
    """Train, measure and write the checkpoint."""
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model = train()
    seconds = time.perf_counter() - start
    torch.save(model, CHECKPOINT)
    np.savez_compressed(IMAGES, held_out()[0].numpy())
    size = CHECKPOINT.stat().st_size
    print(f"accuracy {accuracy(model):.4f} after {seconds:.0f} s; {CHECKPOINT} ({size} bytes)")


if __name__ == "__main__":
    main()
