from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

import rewrite
from passes import BatchNormToGroupNorm
from rewrite.calibration.augment import variations
from rewrite.calibration.batches import Batches
from rewrite.errors import OptionError
from rewrite.runtime.inputs import Inputs


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double().eval()  # fmt: skip


def batches(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, 10, 10, generator=generator) for _ in range(count)]


def fit(data: list[torch.Tensor], mix: int = 0) -> rewrite.Result[nn.Sequential]:
    item = BatchNormToGroupNorm(keep="function", num_groups=2, mix=mix)
    return rewrite.convert(network(), [item], calibration=data, verify=False)


# -- sums -------------------------------------------------------------------------------------


# -- batches ----------------------------------------------------------------------------------


def test_every_fifth_sample_is_held_out() -> None:
    data = Batches(network(), list(torch.arange(12.0).view(12, 1).split(6)))
    fitted = torch.cat([batch.args[0] for batch in data]).flatten().tolist()
    held = torch.cat([batch.args[0] for batch in data.held]).flatten().tolist()
    assert held == [4.0, 9.0] and fitted == [n for n in range(12) if n not in held]
    assert data.seen == 12


def test_what_is_held_out_is_bounded() -> None:
    data = Batches(network(), (torch.zeros(100, 1) for _ in range(10)))
    assert sum(len(batch.args[0]) for batch in data) > 900
    assert sum(len(batch.args[0]) for batch in data.held) <= 64


def test_no_batch_is_an_error() -> None:
    with pytest.raises(OptionError, match="no batch"):
        list(Batches(network(), []))


def test_variations_depend_on_the_batch_alone() -> None:
    image = torch.rand(4, 3, 8, 8)
    first, second = (list(variations(Inputs((image,)))) for _ in range(2))
    assert len(first) == 2 and first[0].args[0].shape == image.shape
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.args[0], b.args[0]) and not torch.equal(a.args[0], image)
    assert list(variations(Inputs((torch.rand(4, 8),)))) == []
    assert list(variations(Inputs((torch.zeros(4, 3, 8, 8, dtype=torch.long),)))) == []


# -- many processes ---------------------------------------------------------------------------


def _fit_as(rank: int, port: int, mix: int) -> rewrite.Result[nn.Sequential]:
    """NormFit on every second batch of 5 samples, of which the last is held out."""
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        return fit(batches(4, 5)[rank::2], mix)
    finally:
        distributed.destroy_process_group()


def _other_rank(port: int, mix: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.save(_fit_as(1, port, mix).model.state_dict(), path)


@pytest.mark.parametrize(("mix", "weight"), [(0, "4.weight"), (2, "4.unmix.up")])
def test_two_processes_fit_what_one_does(mix: int, weight: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = tmp_path / "1.pt"
    process = multiprocessing.get_context("spawn").Process(
        target=_other_rank, args=(port, mix, str(other))
    )
    process.start()
    first = _fit_as(0, port, mix)
    process.join()
    second = torch.load(other)
    alone = fit(batches(4, 5), mix)
    half = fit(batches(4, 5)[::2], mix)
    for key, value in first.model.state_dict().items():
        assert torch.equal(second[key], value)
        expected = alone.model.state_dict()[key]
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    assert first.report.notes == alone.report.notes
    few, many = (r.model.get_parameter(weight) for r in (half, first))
    assert not torch.allclose(few, many, rtol=1e-6)
