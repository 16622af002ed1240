"""An exported program opens; an archive that would run something does not."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch

from rewrite.checkpoint.load import load, save
from rewrite.errors import CheckpointError
from tests.checkpoint.exported.programs import Trap, altered

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
