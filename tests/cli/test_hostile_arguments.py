"""A hostile file at each file argument of each command: exit 2, one line, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rewrite
from benchmarks import _hostile
from models.randomize import randomize_norms_
from rewrite.cli.main import main
from rewrite.errors import RewriteError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHAPE = ("--input", "1x3x8x8")
LINEAR = 'torch.nn:Linear({"in_features": 3, "out_features": 3})'

MODELS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "@"),
    "inspect --signal": ("inspect", "--signal", "@", *SHAPE),
    "inspect --path-norm": ("inspect", "--path-norm", "@", *SHAPE),
    "inspect --before": ("inspect", "--signal", "good.pt", "--plot", "o.svg", "--before", "@"),
    "convert": ("convert", "--fold", "@", "-o", "o.pt", *SHAPE),
    "convert a name": ("convert", "--fold", "@"),
    "export": ("export", "@", "o.onnx", *SHAPE),
    "verify A": ("verify", "@", "good.pt", *SHAPE),
    "verify B": ("verify", "good.pt", "@", *SHAPE),
    "verify a graph": ("verify", "good.onnx", "@", *SHAPE),
    "verify a graph, turned": ("verify", "@", "good.onnx", *SHAPE),
    "compare A": ("compare", "@", "good.pt", *SHAPE),
    "compare B": ("compare", "good.pt", "@", *SHAPE),
    "recover STUDENT": ("recover", "@", "--teacher", "good.pt", "--data", "good.npy"),
    "recover TEACHER": ("recover", "good.pt", "--teacher", "@", "--data", "good.npy"),
    "apply-map CHECKPOINT": ("apply-map", "good.json", "@", "o.pt"),
}
"""Where a command takes a MODEL or a state dict: `@` is the file."""

DATA: dict[str, tuple[str, ...]] = {
    "inspect --input": ("inspect", "good.pt", "--input", "@"),
    "signal --input": ("inspect", "--signal", "good.pt", "--input", "@"),
    "convert --input": ("convert", "--fold", "good.pt", "-o", "o.pt", "--input", "@"),
    "convert --calibration": ("convert", "--bn-to-gn", "good.pt", "-o", "o.pt", "--calibration",
                              "@", *SHAPE),
    "convert --recover": ("convert", "--bn-to-gn", "good.pt", "-o", "o.pt", "--recover", "@",
                          *SHAPE),
    "export --input": ("export", "good.pt", "o.onnx", "--input", "@"),
    "verify --input": ("verify", "good.pt", "good.pt", "--input", "@"),
    "verify --calibration": ("verify", "good.pt", "good.pt", "--calibration", "@", *SHAPE),
    "verify a graph --input": ("verify", "good.onnx", "--input", "@"),
    "verify a graph --calibration": ("verify", "good.onnx", "good.pt", "--calibration", "@"),
    "compare --input": ("compare", "good.pt", "good.pt", "--input", "@"),
    "recover --data": ("recover", "good.pt", "--teacher", "good.pt", "--data", "@", "-o", "o.pt"),
    "recover --data --labels": ("recover", "good.pt", "--teacher", "good.pt", "--data", "@",
                                "--labels", "-o", "o.pt"),
}  # fmt: skip
"""Where a command takes arrays."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of good files: a model, its graph, a report, arrays."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    rewrite.save(randomize_norms_(model).eval(), folder / "good.pt")
    example = (torch.randn(1, 3, 8, 8),)
    rewrite.export(model, folder / "good.onnx", example_inputs=example, verify=False)
    report = rewrite.convert(model, "fold", example_inputs=example).report
    (folder / "good.json").write_text(report.to_json())
    np.save(folder / "good.npy", np.ones((4, 3, 8, 8), "f4"))
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder of links to the good files; end what waits for ever."""
    for file in prepared.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)

    def waits(*_: object) -> None:
        raise TimeoutError("it waits for something that never comes")

    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(20)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(
    capfd: pytest.CaptureFixture[str], here: Path, arguments: tuple[str, ...], file: str
) -> str:
    """Run a command on a file, hold it to its promises, and return what it said."""
    before = sorted(path.name for path in here.iterdir())
    code = main([file if argument == "@" else argument for argument in arguments])
    said = capfd.readouterr().err
    lines = said.strip().splitlines()
    assert (code, len(lines)) == (2, 1), said
    assert file in said and "Traceback" not in said
    assert sorted(path.name for path in here.iterdir()) == before
    return said


def _lying(**entry: object) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry})
    return len(header).to_bytes(8, "little") + header.encode() + bytes(8)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _bytes(data: Callable[[str], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data(path.name))

    return write


def _program(name: str) -> bytes:
    return dict(_hostile.programs())["opaque_constant.pt2"]


MODEL_FILES: dict[str, Callable[[Path], None]] = {
    "call.pt": _bytes(lambda name: _hostile.saved(_hostile.payload(name))),
    "old.pt": _bytes(lambda name: _hostile.saved(_hostile.payload(name), zipped=False)),
    "bare.pkl": _bytes(lambda _: b"cos\nsystem\n(S'echo > pwned_bare.pkl'\ntR."),
    "attribute.pth": _bytes(
        lambda name: _hostile.saved(_hostile.with_attribute("x", _hostile.payload(name)))
    ),
    "program.pt2": _bytes(_program),
    "shape.safetensors": _bytes(lambda _: _lying(shape=[1 << 40])),
    "bytes.safetensors": _bytes(lambda _: _lying(data_offsets=[4, 12])),
    "header.safetensors": _bytes(lambda _: (1 << 30).to_bytes(8, "little") + b"{}"),
    "empty.ckpt": _bytes(lambda _: b""),
    "pipe.pt": _pipe,
    "pipe.safetensors": _pipe,
    "zero.pt": _device,
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of hostile models."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, write in MODEL_FILES.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("place", MODELS)
def test_a_hostile_file_as_a_model(
    here: Path, hostile: Path, capfd: pytest.CaptureFixture[str], place: str
):
    for name in sorted(MODEL_FILES):
        (here / name).symlink_to(hostile / name)
        # Of a module only the tensors are opened there: what else it holds is left alone.
        if (place, name) != ("apply-map CHECKPOINT", "attribute.pth"):
            refused(capfd, here, MODELS[place], name)
    assert not list(here.glob("pwned*"))


def _npz(name: str, content: bytes, twice: bool = False) -> bytes:
    with io.BytesIO() as data:
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(name, content)
            if twice:
                archive.writestr(name.upper(), content)
        return data.getvalue()


def _npy(array: np.ndarray) -> bytes:
    with io.BytesIO() as data:
        np.save(data, array, allow_pickle=True)
        return data.getvalue()


def _objects(name: str) -> bytes:
    array = np.empty(1, object)
    array[0] = _hostile.payload(name)
    return _npy(array)


_HUGE = _npy(np.zeros(3)).replace(b"(3,)", b"(9999999999999,)"[:16])[:-24]

DATA_FILES: dict[str, Callable[[Path], None]] = {
    "objects.npy": _bytes(_objects),
    "objects.npz": _bytes(lambda name: _npz("x.npy", _objects(name))),
    "twice.npz": _bytes(lambda _: _npz("x.npy", _npy(np.ones((4, 3, 8, 8))), twice=True)),
    "huge.npy": _bytes(lambda _: _HUGE),
    "text.npz": _bytes(lambda _: b"PK\x03\x04 and no more"),
    "call.pt": MODEL_FILES["call.pt"],
    "old.pth": MODEL_FILES["old.pt"],
    "pipe.npz": _pipe,
    "pipe.pt": _pipe,
    "zero.npy": _device,
    "zero.npz": _device,
}


@pytest.mark.parametrize("place", DATA)
def test_a_hostile_file_as_data(here: Path, capfd: pytest.CaptureFixture[str], place: str):
    for name, write in DATA_FILES.items():
        write(here / name)
    for name in DATA_FILES:
        refused(capfd, here, DATA[place], name)
    assert not list(here.glob("pwned*"))


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[]", b'{"passes": 3}', b"\x80\x04cos\nsystem\n", b'{"a":', b""]
)
def test_a_hostile_report(here: Path, capfd: pytest.CaptureFixture[str], content: bytes):
    (here / "map.json").write_bytes(content)
    refused(capfd, here, ("apply-map", "@", "good.pt", "o.pt"), "map.json")


@pytest.mark.parametrize("make", [_pipe, _device])
def test_a_report_that_never_ends(here: Path, capfd: pytest.CaptureFixture[str], make):
    make(here / "map.json")
    assert "not a file" in refused(capfd, here, ("apply-map", "@", "good.pt", "o.pt"), "map.json")


def test_what_is_good_passes_at_the_same_places(here: Path):
    for place in ("inspect", "compare A", "verify B", "convert"):
        arguments = [name if name != "@" else "good.pt" for name in MODELS[place]]
        assert main([*arguments, "--quiet"]) == 0, place
    torch.save(torch.load("good.pt", weights_only=False).state_dict(), "state.pt")
    for pair in (("state.pt", "good.pt"), ("good.pt", "state.pt")):
        assert main(["verify", *pair, *SHAPE, "--quiet"]) == 0


@pytest.mark.parametrize("name", ["call.pt", "old.pt", "attribute.pth"])
def test_with_a_factory_a_payload_is_left_alone(here: Path, name: str):
    MODEL_FILES[name](here / name)
    assert main(["inspect", name, "--factory", LINEAR, "--quiet"]) == 2
    torch.save({"model": nn.Linear(3, 3).state_dict(), "x": _hostile.payload(name)}, name)
    assert main(["inspect", name, "--factory", LINEAR, "--quiet"]) == 0
    assert not list(here.glob("pwned*"))


@pytest.mark.parametrize("place", ["convert", "recover STUDENT"])
def test_a_report_onto_what_is_read(here: Path, capfd: pytest.CaptureFixture[str], place: str):
    arguments = ["good.pt" if argument == "@" else argument for argument in MODELS[place]]
    before = (here / "good.pt").read_bytes()
    assert main([*arguments, "--report", "good.pt", "--force"]) == 2
    assert "good.pt: is good.pt" in capfd.readouterr().err
    assert (here / "good.pt").read_bytes() == before


def test_python_entries_refuse_pipes_and_devices(here: Path):
    from rewrite.calibration.data import open_calibration
    from rewrite.fold.report_file import read_report
    from rewrite.onnx.verify import verify_onnx
    from rewrite.runtime.stored.input_files import load_inputs

    model = rewrite.load("good.pt")
    readers = {
        "x.pt": rewrite.load,
        "y.safetensors": lambda path: rewrite.load(path, factory=LINEAR),
        "x.npz": load_inputs,
        "y.pt": load_inputs,
        "x.npy": lambda path: open_calibration(path, model),
        "z.pt": lambda path: open_calibration(path, model),
        "x.onnx": verify_onnx,
        "x.json": lambda path: read_report(Path(path)),
    }
    for number, (name, read) in enumerate(readers.items()):
        (_pipe, _device)[number % 2](here / name)
        with pytest.raises(RewriteError, match=r"is a (pipe|device), not a file"):
            read(name)


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 10**30])
def test_a_seed_has_64_bits(here: Path, capfd: pytest.CaptureFixture[str], seed: int):
    assert main(["inspect", "good.pt", *SHAPE, "--seed", str(seed)]) == 2
    assert capfd.readouterr().err == f"rewrite: --seed {seed}: a seed has at most 64 bits\n"
    assert main(["inspect", "good.pt", *SHAPE, "--seed", str((1 << 64) - 1), "--quiet"]) == 0
