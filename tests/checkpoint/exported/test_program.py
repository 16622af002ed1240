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
    with pytest.raises(CheckpointError, match=r"damaged|no part of an exported"):
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


# -- tensors that would lie beside their bytes ---------------------------------------------------


def with_weight(program, tmp_path, **meta):
    """Return the program with other numbers in the entry of the convolution's weight."""

    def change(name, content):
        if not name.endswith("model_weights_config.json"):
            return None
        config = json.loads(content)
        entry = config["config"]["conv.weight"]["tensor_meta"]
        for key, value in meta.items():
            entry[key] = [{"as_int": n} for n in value] if isinstance(value, list) else value
        return json.dumps(config).encode()

    return altered(program, tmp_path, change)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"strides": [1000, 9, 3, 1]}, "larger than its bytes"),
        ({"strides": [27, 9, 3, 1 << 40]}, "larger than its bytes"),
        ({"strides": [-27, 9, 3, 1]}, "is no size"),
        ({"strides": [27, 9, 3]}, "is no size"),
        ({"strides": [1 << 63, 9, 3, 1]}, "is no number"),
        ({"storage_offset": {"as_int": 1}}, "larger than its bytes"),
        ({"storage_offset": {"as_int": -1}}, "is no size"),
        ({"storage_offset": {"as_int": 1 << 62}}, "is no size"),
        ({"storage_offset": {"as_expr": {"expr_str": "9**9**9"}}}, ""),
        ({"sizes": [4, 3, 3, 4]}, "larger than its bytes"),
        ({"sizes": [1 << 31, 1 << 31, 1, 1], "strides": [0, 0, 0, 0]}, "repeats 108 numbers"),
        ({"sizes": [4, 3, 3, -3]}, "is no size"),
        ({"sizes": [4, 3, 3, 3] + [1] * 100, "strides": [27, 9, 3, 1] + [0] * 100}, "is no size"),
        ({"dtype": 8}, "larger than its bytes"),
        ({"dtype": 99}, ""),
        ({"layout": 1}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_beside_its_bytes_is_refused(program, tmp_path, meta, words):
    with pytest.raises(CheckpointError) as caught:
        load(with_weight(program, tmp_path, **meta))
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


def test_another_view_of_the_same_bytes_opens(program, tmp_path):
    """Strides are the file's own business as long as each element lies within the member."""
    path = with_weight(program, tmp_path, strides=[27, 9, 1, 3])
    turned = program[1].conv.weight.detach().transpose(2, 3)
    assert torch.equal(load(path).state_dict()["conv.weight"], turned)
