"""Calibration data by reference: a folder of images, a file of arrays, or a factory.

    photos/                     images, resized, cropped and normalized as the model's own
                                configuration says (timm), else as ImageNet models are
    batch.npy .npz .pt .safetensors   arrays; the first axis is the batch; labels are ignored
    package.module:factory      a callable that returns an iterable of batches

Everything is read batch by batch; a broken image is left out and named. Under `torch.distributed`
rank r of w reads the batches r, r + w, r + 2 w …: together they read what one process would.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rewrite.distributed import rank_and_world
from rewrite.errors import OptionError, RewriteError
from rewrite.files import is_folder, is_there, no_file
from rewrite.runtime.stored.array_files import read_arrays

BATCH_SIZE = 16


_IMAGENET_MEAN = (0.485, 0.456, 0.406)


_IMAGENET_STD = (0.229, 0.224, 0.225)


_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What an image may be, whatever it is called: others start programs (EPS) or read beside them."""

_MOST_PIXELS = 80_000_000
"""Fewer than those from which on pillow warns."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})


_ARRAYS = frozenset({".npy", ".npz", ".pt", ".pth", ".safetensors"})


@dataclass(frozen=True)
class ImageFormat:
    """How an image becomes an input: side of the crop, channels, mean and deviation of each."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 0.875

    @classmethod
    def of(
        cls,
        model: nn.Module,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> ImageFormat:
        """Return what a model takes; what is given wins over what its configuration says.

        Raises:
            OptionError: the size or a divisor is not positive.
        """
        config = getattr(model, "pretrained_cfg", None)
        config = config if isinstance(config, dict) else {}
        shape = config.get("input_size", (3, 224, 224))
        channels = _image_channels(model) or int(shape[0])
        means = tuple(mean or config.get("mean", _IMAGENET_MEAN))
        stds = tuple(std or config.get("std", _IMAGENET_STD))
        found = cls(
            size or int(shape[-1]), channels, _fitted(means, channels), _fitted(stds, channels),
            float(config.get("crop_pct") or 0.875),
        )  # fmt: skip
        if found.size < 1 or any(value <= 0 for value in found.std):
            raise OptionError(
                f"calibration images: size {found.size} and std {found.std} must be positive"
            )
        return found


def _image_channels(model: nn.Module) -> int | None:
    """Return how many channels the first convolution reads, if it is one of images."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels if module.in_channels in (1, 3) else None
    return None


def _fitted(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if channels == 1:
        return (sum(values) / len(values),)
    raise OptionError(f"calibration images: {len(values)} means or deviations, {channels} channels")


@dataclass
class ImageFolder:
    """The images of a folder and its subfolders, in the order of their names, as batches.

    Of each `batch_size` files those that are readable make a batch; every `world`-th batch from
    number `rank` on is read. `left_out` names the files that could not be, once they were tried.
    """

    files: tuple[Path, ...]
    format: ImageFormat
    batch_size: int = BATCH_SIZE
    rank: int = 0
    world: int = 1
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(range(self.rank * self.batch_size, len(self.files), self._step))

    @property
    def _step(self) -> int:
        return self.world * self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches of normalized images.

        Raises:
            OptionError: no file is a readable image.
        """
        self.left_out.clear()
        read = 0
        for start in range(self.rank * self.batch_size, len(self.files), self._step):
            files = self.files[start : start + self.batch_size]
            images = [image for file in files if (image := self._read(file)) is not None]
            read += len(images)
            if images:
                yield torch.stack(images)
        if not read and self.world == 1:
            first = self.left_out[0] if self.left_out else "no file"
            raise OptionError(
                f"calibration images: none of {len(self.files)} is readable ({first})"
            )

    def _read(self, file: Path) -> Tensor | None:
        try:
            from PIL import Image
        except ImportError as error:
            raise OptionError("a folder of images needs pillow; pip install pillow") from error
        if wrong := no_file(file):
            self.left_out.append(f"{file.name}: {wrong}")
            return None
        try:
            with Image.open(file, formats=_FORMATS) as opened:
                self._check_size(*opened.size)
                image = opened.convert("L" if self.format.channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.left_out.append(f"{file.name}: {error}")
            return None
        return self._as_tensor(image)

    def _check_size(self, width: int, height: int) -> None:
        """Raise ValueError for an image that would take more memory than a photo does."""
        scale = self.format.size / self.format.crop / max(1, min(width, height))
        resized = scale * width * scale * height
        if width * height > _MOST_PIXELS or resized > _MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")

    def _as_tensor(self, image: Any) -> Tensor:
        import numpy as np
        from PIL import Image

        form = self.format
        scale = form.size / form.crop / min(image.size)
        width, height = (max(form.size, round(side * scale)) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - form.size) // 2, (height - form.size) // 2
        cropped = resized.crop((left, top, left + form.size, top + form.size))
        values = torch.from_numpy(np.array(cropped, dtype=np.float32) / 255)
        values = values[None] if values.dim() == 2 else values.permute(2, 0, 1)
        shape = (-1, 1, 1)
        return (values - torch.tensor(form.mean).view(shape)) / torch.tensor(form.std).view(shape)


@dataclass(frozen=True)
class Share:
    """Every `world`-th batch of `source`, from number `rank` on."""

    source: Iterable[Any]
    rank: int
    world: int

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches."""
        return islice(iter(self.source), self.rank, None, self.world)


def _read_with_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def open_calibration(
    reference: str,
    model: nn.Module,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = BATCH_SIZE,
    read: Callable[[Path], Any] = _read_with_torch,
) -> Iterable[Any]:
    """Return the batches that `reference` stands for; images become what `model` takes.

    Args:
        reference: a folder of images, a .npz, .npy or .pt file, or package.module:factory.
        model: whose dtype, device and recorded input size the batches get.
        size: the side of the square that images are cropped to; by default the model's.
        mean: of each channel, subtracted; by default the model's.
        std: of each channel, divided by; by default the model's.
        batch_size: how many images or samples a batch has, at least 1.
        read: opens a .pt file; the commands pass the reader of checkpoints.

    Raises:
        OptionError: nothing usable is there.
    """
    source = _open(reference, model, size, mean, std, batch_size, read)
    rank, world = rank_and_world()
    if world == 1:
        return source
    if isinstance(source, ImageFolder):
        return replace(source, rank=rank, world=world)
    return source[rank::world] if isinstance(source, list) else Share(source, rank, world)


def _open(
    reference: str,
    model: nn.Module,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int,
    read: Callable[[Path], Any],
) -> Iterable[Any]:
    path = Path(reference)
    if is_folder(path):
        files = tuple(sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES))
        if not files:
            kinds = " ".join(sorted(_SUFFIXES))
            raise OptionError(f"calibration folder {path}: no image in it ({kinds})")
        return ImageFolder(files, ImageFormat.of(model, size, mean, std), batch_size)
    if path.suffix.lower() in _ARRAYS:
        return _split(_read_array(path, read), batch_size)
    if is_there(path):
        kinds = " ".join(sorted(_ARRAYS))
        raise OptionError(f"calibration file {path}: not one of {kinds}, nor a folder of images")
    if ":" in reference:
        return _call(reference)
    raise OptionError(
        f"calibration data {reference}: no such folder or file; pass a folder of images, "
        "a .npy, .npz, .pt or .safetensors file, or package.module:factory"
    )


def _read_array(path: Path, read: Callable[[Path], Any]) -> Any:
    if wrong := no_file(path):
        raise OptionError(f"calibration file {path}: {wrong}")
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            return next(iter(read_arrays(path).values()), None)
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return next(iter(load_file(path).values()), None)
        return read(path)
    except RewriteError:
        raise
    except Exception as error:  # a damaged file may raise anything
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptionError(f"calibration file {path}: cannot be read: {message}") from error


def _split(value: Any, batch_size: int) -> Iterable[Any]:
    """Return batches of one array; a list of batches as it is; of a mapping, the first array."""
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return list(value)
    if not isinstance(value, Tensor):
        raise OptionError(f"calibration data: holds {type(value).__name__}, not an array")
    if value.dim() < 2 or len(value) == 0:
        shape = tuple(value.shape)
        raise OptionError(f"calibration data: shape {shape}; the first axis has to be the batch")
    if value.dtype in (torch.float64, torch.float16, torch.bfloat16):
        value = value.float()
    return list(value.split(batch_size))


def _call(reference: str) -> Iterable[Any]:
    name, _, attribute = reference.partition(":")
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"calibration factory {reference}: {error}") from error
    try:
        made = factory()
    except Exception as error:  # it is the user's code: it may raise anything
        raise OptionError(f"calibration factory {reference} failed: {error}") from error
    if isinstance(made, Tensor):
        return _split(made, BATCH_SIZE)
    if not hasattr(made, "__iter__"):
        kind = type(made).__name__
        raise OptionError(f"calibration factory {reference} returned {kind}, no batches")
    return cast(Iterable[Any], made)
