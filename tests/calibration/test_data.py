from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from rewrite.calibration.data import ImageFolder, ImageFormat, Share, open_calibration
from rewrite.errors import OptionError


def model(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3))


def images() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8)]


def write_image(path: Path, size: tuple[int, int] = (20, 14)) -> None:
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def test_reads_a_folder_as_the_model_takes_it(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        write_image(tmp_path / name)
    network = model()
    network.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0,
    }  # fmt: skip
    (batch,) = open_calibration(str(tmp_path), network)
    assert batch.shape == (2, 3, 8, 8)
    (other,) = open_calibration(str(tmp_path), network, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(batch, (other - 0.5) / 0.25)
    assert other.min() >= 0 and other.max() <= 1


def test_grey_models_get_grey_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (batch,) = open_calibration(str(tmp_path), model(1), size=8)
    assert batch.shape == (1, 1, 8, 8)


def test_a_broken_image_is_left_out_and_named(tmp_path: Path) -> None:
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    source = open_calibration(str(tmp_path), model(), size=8)
    assert [len(batch) for batch in source] == [1]
    assert source.left_out[0].startswith("bad.png")  # type: ignore[attr-defined]
    (tmp_path / "good.png").unlink()
    with pytest.raises(OptionError, match="none of 1 is readable"):
        list(open_calibration(str(tmp_path), model(), size=8))


def test_batches_are_streamed(tmp_path: Path) -> None:
    for number in range(5):
        write_image(tmp_path / f"{number}.png")
    source = open_calibration(str(tmp_path), model(), size=8, batch_size=2)
    assert [len(batch) for batch in source] == [2, 2, 1]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_reads_arrays(tmp_path: Path, suffix: str) -> None:
    path, value = tmp_path / f"batch{suffix}", torch.randn(5, 3, 8, 8)
    if suffix == ".npy":
        np.save(path, value.numpy())
    elif suffix == ".npz":
        np.savez(path, x=value.numpy(), y=np.arange(5))
    elif suffix == ".pt":
        torch.save({"x": value, "y": torch.arange(5)}, path)
    else:
        save_file({"x": value}, path)
    batches = list(open_calibration(str(path), model(), batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), value)


def test_calls_a_factory() -> None:
    batches = list(open_calibration(f"{__name__}:images", model()))
    assert [len(batch) for batch in batches] == [2, 1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", "no such folder or file"),
        ("no.such.module:factory", "No module named"),
        ("math:pi", "failed"),
        ("math:gamma", "failed"),
    ],
)
def test_complains_about_what_is_no_data(reference: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(open_calibration(reference, model()))


def test_complains_about_bad_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no image in it"):
        open_calibration(str(tmp_path), model())
    (tmp_path / "x.npy").write_bytes(b"garbage")
    with pytest.raises(OptionError, match="cannot be read"):
        open_calibration(str(tmp_path / "x.npy"), model())
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(OptionError, match="first axis"):
        open_calibration(str(tmp_path / "flat.npy"), model())
    np.save(tmp_path / "empty.npy", np.zeros((0, 3, 8, 8)))
    with pytest.raises(OptionError, match="shape"):
        open_calibration(str(tmp_path / "empty.npy"), model())
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(OptionError, match="not one of"):
        open_calibration(str(tmp_path / "x.txt"), model())
    with pytest.raises(OptionError, match="positive"):
        ImageFormat.of(model(), std=(0.0,) * 3)


def test_ranks_share_the_batches() -> None:
    assert list(Share(range(5), 0, 2)) == [0, 2, 4] and list(Share(range(5), 1, 2)) == [1, 3]


def test_ranks_read_the_batches_of_a_folder_that_one_process_would(tmp_path: Path) -> None:
    for number in range(7):
        write_image(tmp_path / f"{number}.png", (20 + number, 14))
    (tmp_path / "2.png").write_bytes(b"no image")
    whole = open_calibration(str(tmp_path), model(), size=8, batch_size=2)
    assert isinstance(whole, ImageFolder)
    ranks = [replace(whole, rank=rank, world=2, left_out=[]) for rank in range(2)]
    batches = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [2, 2] and len(whole) == 4
    assert [rank.left_out != [] for rank in ranks] == [False, True]
    merged = [batches[0][0], batches[1][0], batches[0][1], batches[1][1]]
    for one, shared in zip(whole, merged, strict=True):
        assert torch.equal(one, shared)
    list(whole)
    assert len(whole.left_out) == 1  # named once, however often it is read


def test_a_tensor_file_is_opened_by_the_reader_that_is_given(tmp_path: Path) -> None:
    read: list[Path] = []

    def reader(path: Path) -> torch.Tensor:
        read.append(path)
        return torch.ones(5, 3)

    (tmp_path / "x.pt").write_bytes(b"no tensors")
    batches = list(open_calibration(str(tmp_path / "x.pt"), model(), read=reader))
    assert read == [tmp_path / "x.pt"] and [len(batch) for batch in batches] == [5]
