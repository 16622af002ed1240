"""Products that go from file to file: the bits of a product in memory, at their places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rewrite.errors import CheckpointError
from rewrite.fold.executor import check_finite
from rewrite.hub.safetensors_file import open_safetensors
from rewrite.sharded import streaming
from rewrite.sharded.streaming import scale_tensor
from rewrite.weights.scaling import Scaling


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def streamed(path: Path, tensor: Tensor, scaling: Scaling) -> list[Tensor]:
    """Return what two places hold once the product of a tensor of a file went there."""
    save_file({"before": torch.ones(3), "w": tensor, "z": torch.ones(3)}, path)
    places = [bytearray(tensor.nbytes), bytearray(tensor.nbytes)]

    def into(place: bytearray) -> streaming.Write:
        def write(content: memoryview, begin: int) -> None:
            place[begin : begin + len(content)] = content

        return write

    scale_tensor(
        open_safetensors(path), "w", [into(place) for place in places], scaling,
        lambda block: check_finite("w", block),
    )  # fmt: skip
    return [torch.frombuffer(p, dtype=tensor.dtype).reshape(tensor.shape) for p in places]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "axis", "parts"),
    [
        ((37, 64), 1, ()), ((37, 64), 0, ()), ((90, 64), 1, ((0, 31, 29),)),
        ((3, 20, 33), 2, ((0, 1, 1), (1, 7, 9))), ((4, 3000), 1, ()), ((1, 64), 1, ()),
        ((5,), 0, ()),
    ],
)  # fmt: skip
def test_the_product_is_that_in_memory(
    shape: tuple[int, ...], axis: int, parts: tuple[tuple[int, int, int], ...],
    dtype: torch.dtype, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    scaling = Scaling(torch.randn(shape[axis], dtype=torch.float64), axis, parts)
    expected = scaling(tensor, dtype)
    monkeypatch.setattr("rewrite.sharded.streaming.CHUNK", 1000)
    monkeypatch.setattr("rewrite.weights.scaling.BLOCK", 300)
    for got in streamed(tmp_path / "w.safetensors", tensor, scaling):
        assert torch.equal(got, expected) and not torch.equal(got, tensor)


def test_a_product_that_is_not_finite_is_refused(threads: int, tmp_path: Path) -> None:
    tensor = torch.ones(40, 64, dtype=torch.float16)
    vector = torch.ones(64, dtype=torch.float64)
    vector[-1] = 65504.0
    streamed(tmp_path / "w.safetensors", tensor, Scaling(vector, 1))
    tensor[-1, -1] = 1.5
    with pytest.raises(CheckpointError, match=r"w would hold values that are not finite"):
        streamed(tmp_path / "w.safetensors", tensor, Scaling(vector, 1))


def test_a_file_that_became_shorter_is_refused(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(40, 64)}, path)
    opened = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="ends within w"):
        scale_tensor(opened, "w", [], Scaling(torch.ones(64).double(), 1), lambda block: None)


def test_an_empty_tensor_is_nothing_to_write(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    written: list[bytes] = []
    save_file({"w": torch.empty(5, 0), "z": torch.ones(3)}, path)
    scaling = Scaling(torch.ones(0).double(), 1)
    scale_tensor(
        open_safetensors(path), "w", [lambda content, begin: written.append(bytes(content))],
        scaling, lambda block: None,
    )  # fmt: skip
    assert b"".join(written) == b""
