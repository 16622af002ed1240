"""The state of a training is read as checkpoints are: nothing in its folder runs or is believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import _hostile
from rewrite.cli.main import main
from rewrite.errors import CheckpointError, RewriteError
from rewrite.training import recover
from rewrite.training.recovered import Recovered

pytest.importorskip("accelerate")

SETTINGS = {"epochs": 2, "batch_size": 8, "evaluations": 4}


def _model(norm: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4) if norm else nn.Tanh()).eval()


def _data() -> list[Tensor]:
    return list(torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).split(8))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a training that was cut off."""
    monkeypatch.chdir(tmp_path)

    def dies(line: str) -> None:
        if line.startswith("step 5 "):
            raise MemoryError

    with pytest.raises(MemoryError):
        recover(_model(True), _model(False), _data(), state="state", progress=dies, **SETTINGS)
    return tmp_path / "state"


def _go_on() -> Recovered[nn.Module]:
    return recover(_model(True), _model(False), _data(), state="state", **SETTINGS)


def test_a_state_goes_on(state: Path) -> None:
    assert {file.name for file in state.iterdir()} >= {"loop_0.pt", "loop_1.pt", "optimizer.bin"}
    assert _go_on() is not None


def test_no_file_of_a_state_runs_a_payload(state: Path, tmp_path: Path) -> None:
    evil = _hostile.saved(_hostile.payload("state"))
    for file in sorted(state.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(evil)
        with pytest.raises(CheckpointError) as caught:
            _go_on()
        assert file.name in str(caught.value) and "\n" not in str(caught.value)
        file.write_bytes(whole)
    # accelerate unpickles files of this name whole, whatever they hold.
    for number in range(2):
        (state / f"custom_checkpoint_{number}.pkl").write_bytes(evil)
    with pytest.raises(CheckpointError, match="custom_checkpoint_0"):
        _go_on()
    assert not list(tmp_path.glob("pwned*"))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _another(file: Path) -> None:
    torch.save({"a": torch.ones(2)}, file)


@pytest.mark.parametrize("spoil", [_cut, _pipe, _another, Path.unlink])
@pytest.mark.parametrize("name", ["loop_0.pt", "loop_1.pt", "optimizer.bin", "model.safetensors"])
def test_a_spoiled_state_is_one_line(state: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(state / name)
    with pytest.raises(RewriteError) as caught:
        _go_on()
    assert str(caught.value).startswith("state") and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [0, 1])
def test_a_folder_that_the_system_does_not_list_is_one_line(
    state: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    lists, met = Path.iterdir, []

    def refuses(folder: Path) -> Iterator[Path]:
        met.append(folder)
        if len(met) > read:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return lists(folder)

    monkeypatch.setattr(Path, "iterdir", refuses)
    with pytest.raises(CheckpointError, match=r"^state: permission denied$"):
        _go_on()
    assert met == [Path("state")] * (read + 1)


def test_a_best_state_of_another_student_is_refused(state: Path) -> None:
    held = torch.load(state / "loop_0.pt", weights_only=True)
    held["best"]["state"].popitem()
    torch.save(held, state / "loop_0.pt")
    with pytest.raises(CheckpointError, match="none of this student"):
        _go_on()


def test_a_file_in_the_place_of_a_state(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, norm in (("student.pt", True), ("teacher.pt", False)):
        torch.save(_model(norm), name)
    torch.save(torch.cat(_data()), "data.pt")
    evil = _hostile.saved(_hostile.payload("state"))
    (state / "loop_0.pt").write_bytes(evil)
    arguments = ["recover", "student.pt", "--teacher", "teacher.pt", "--data", "data.pt", "--quiet"]
    assert main([*arguments, "--state", "state"]) == 2
    assert main([*arguments, "--state", "data.pt"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_run_that_was_cut_off_while_it_replaced_a_state_goes_on_from_the_old_one(
    state: Path,
) -> None:
    whole = _go_on()
    state.rename(state.with_name(".state.old"))
    state.with_name("state.part").mkdir()
    assert _go_on().steps == whole.steps
    assert [place.name for place in state.parent.iterdir()] == ["state"]


def test_a_full_disk_leaves_the_state_that_was_there(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in state.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match="state: the state cannot be written"):
            _go_on()
    assert {file.name: file.read_bytes() for file in state.iterdir()} == before
    assert [place.name for place in state.parent.iterdir()] == ["state"]
