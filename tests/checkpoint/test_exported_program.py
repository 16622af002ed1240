"""An exported program opens; an archive that would run something does not."""

from __future__ import annotations

import io
import json
import os
import zipfile

import pytest
import torch
from torch import nn

from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("gain", torch.full((1,), 2.0))

    def forward(self, x, *, scale=1.0):
        return {"y": torch.relu(self.norm(self.conv(x))) * self.gain * scale}


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "m.pt2"
    model = Net().eval()
    shapes = {"x": {0: torch.export.Dim("batch")}, "scale": None}
    inputs = (torch.randn(2, 3, 8, 8),)
    exported = torch.export.export(model, inputs, {"scale": 2.0}, dynamic_shapes=shapes)
    torch.export.save(exported, path)
    return path, model


def altered(program, tmp_path, change):
    """The archive with members replaced by `change(name, content)`; None drops nothing."""
    path, _ = program
    target = tmp_path / "altered.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(name, content) or content)
    return target


def replaced(old, new):
    def change(name, content):
        if not name.endswith("model.json"):
            return None
        assert old.encode() in content, "the test would prove nothing"
        return content.replace(old.encode(), new.encode())

    return change


def test_an_exported_program_opens_and_runs(program):
    path, model = program
    x = torch.randn(5, 3, 8, 8)
    back = load(path)
    assert isinstance(back, torch.fx.GraphModule)
    torch.testing.assert_close(back(x, scale=2.0)["y"], model(x, scale=2.0)["y"])
    assert sorted(back.state_dict()) == sorted(model.state_dict())
    back.train()
    back.eval()


def test_what_it_becomes_can_be_saved(program, tmp_path):
    path, _ = program
    x = torch.randn(5, 3, 8, 8)
    back = load(path)
    again = load(save(back, tmp_path / "m.pt"))
    assert torch.equal(again(x, scale=2.0)["y"], back(x, scale=2.0)["y"])


def test_it_opens_under_any_name(program, tmp_path):
    path, _ = program
    other = tmp_path / "model.pt"
    other.write_bytes(path.read_bytes())
    assert isinstance(load(other), torch.fx.GraphModule)


def test_the_copied_archive_opens(program, tmp_path):
    """The negative twin of the attacks: only their change makes the archive refused."""
    load(altered(program, tmp_path, lambda name, content: None))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.ops.aten.relu.default", "torch.hub.load"),
        ("torch.ops.aten.relu.default", "torch.ops.load_library"),
        ("torch.ops.aten.relu.default", "torch.os.system"),
        ("Symbol('s77', positive=True, integer=True)", "__import__('os').system('true')"),
        ("Symbol('s77', positive=True, integer=True)", "exec('x')"),
        ("Symbol('s77', positive=True, integer=True)", "s77.__class__"),
        ('"name": "x"', '"name": "x=print(1)"'),
        ("builtins.dict", "collections.defaultdict"),
        ('\\\\\\"scale\\\\\\"', '\\\\\\"scale\':print(1)\\\\\\"'),
    ],
)
def test_a_program_with_foreign_text_is_refused(program, tmp_path, old, new):
    content = zipfile.ZipFile(program[0]).read("m/models/model.json").decode()
    if old.startswith("Symbol"):
        old = json.dumps(next(s for s in _sizes(content) if "Symbol" in s))[1:-1]
    with pytest.raises(CheckpointError) as caught:
        load(altered(program, tmp_path, replaced(old, new)))
    assert "\n" not in str(caught.value)


def _sizes(text):
    def walk(value):
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "expr_str")
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from walk(item)

    return list(walk(json.loads(text)))


def test_a_trap_in_the_sample_inputs_is_refused(program, tmp_path):
    trap = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(((Trap(trap),), {}), buffer)
    path = altered(
        program, tmp_path, lambda n, c: buffer.getvalue() if "sample_inputs" in n else None
    )
    with pytest.raises(CheckpointError, match="sample inputs"):
        load(path)
    assert not trap.exists()


def test_a_pickled_weight_is_refused(program, tmp_path):
    def change(name, content):
        if name.endswith("model_weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        return None

    with pytest.raises(CheckpointError, match="pickled tensor"):
        load(altered(program, tmp_path, change))


def test_a_compiled_library_is_refused(program, tmp_path):
    path = altered(program, tmp_path, lambda name, content: None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/aotinductor/model/x.so", b"")
    with pytest.raises(CheckpointError, match="no part of an exported program"):
        load(path)


def test_guards_of_the_file_are_never_run(program, tmp_path):
    trap = tmp_path / "ran"
    code = f"__import__('os').system('touch {trap}') is None"

    def change(name, content):
        if not name.endswith("model.json"):
            return None
        tree = json.loads(content)
        tree["guards_code"] = [code]
        return json.dumps(tree).encode()

    load(altered(program, tmp_path, change))(torch.randn(2, 3, 8, 8), scale=2.0)
    assert not trap.exists()


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_a_truncated_archive_is_refused(program, tmp_path, kept):
    path = tmp_path / "m.pt2"
    data = program[0].read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError):
        load(path)


def test_a_constant_that_torch_would_unpickle_is_refused(program, tmp_path):
    weights = json.loads(zipfile.ZipFile(program[0]).read(_WEIGHTS))["config"]["conv.weight"]

    def change(name, content):
        if not name.endswith("constants_config.json"):
            return None
        tree = json.loads(content)
        tree["config"]["x"] = {**weights, "path_name": "opaque_obj_0"}
        return json.dumps(tree).encode()

    with pytest.raises(CheckpointError, match="class of its own"):
        load(altered(program, tmp_path, change))


_WEIGHTS = "m/data/weights/model_weights_config.json"
