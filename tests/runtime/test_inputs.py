from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import models
from rewrite.equivalence.variations import adversarial
from rewrite.errors import VerificationError
from rewrite.runtime.infer_inputs import infer_example_inputs
from rewrite.runtime.input_files import load_inputs, parse_shapes
from rewrite.runtime.inputs import Inputs, batches_for
from rewrite.runtime.leaves import tensors


def test_adversarial_varies_value_batch_and_space():
    cases = dict(adversarial(Inputs.of(torch.ones(1, 3, 64, 64))))
    first = {name: case.args[0] for name, case in cases.items()}
    assert float(first["zeros"].abs().max()) == 0
    assert float(first["ones"].min()) == 1
    assert int((first["impulse"] != 0).sum()) == 1
    assert {first[f"batch of {n}"].shape[0] for n in (1, 2, 7)} == {1, 2, 7}
    assert {t.shape[-1] for t in first.values()} == {32, 64, 96}


def test_adversarial_keeps_indices_in_range():
    ids = torch.tensor([[3, 1, 4]])
    for _, case in adversarial(Inputs.of(ids)):
        assert set(case.args[0].flatten().tolist()) <= {3, 1, 4}


def test_adversarial_is_the_same_for_the_same_seed():
    x = torch.ones(1, 3, 8, 8)
    for (name, a), (_, b) in zip(adversarial(Inputs.of(x)), adversarial(Inputs.of(x)), strict=True):
        assert torch.equal(a.args[0], b.args[0]), name


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(5, 2, 3)), (1, 5, 224, 224)),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)),
            (1, 1, 28, 28),
        ),
        (nn.Linear(7, 2), (2, 7)),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2)), (1, 16)),
        (nn.Conv1d(3, 4, 5), (1, 3, 256)),
        (nn.BatchNorm1d(6), (2, 6)),
    ],
)
def test_inputs_are_inferred_from_the_first_layer(model, shape):
    (x,) = infer_example_inputs(model.eval())
    assert tuple(x.shape) == shape
    model(x)


def test_nothing_is_inferred_for_a_model_of_several_inputs():
    assert infer_example_inputs(nn.Bilinear(2, 3, 4)) is None


def test_inferring_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    infer_example_inputs(model, quick=True)
    assert model[1].num_batches_tracked == 0
    assert model.training


def test_labels_beside_the_inputs_are_left_out():
    batch = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    assert len(tensors(list(batches_for(nn.Linear(3, 1), batch).args))) == 1


def test_shapes_are_parsed():
    x, ids = parse_shapes("1x3x8x8,2x5:int64")
    assert tuple(x.shape) == (1, 3, 8, 8)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("text", ["", "3xx", "axb", "1x3:nothing", "1x-3"])
def test_a_wrong_shape_is_one_clear_line(text):
    with pytest.raises(VerificationError, match="write it as 1x3x224x224") as error:
        parse_shapes(text)
    assert "\n" not in str(error.value)


def test_files_are_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.zeros(3))
    torch.save((torch.ones(4),), tmp_path / "x.pt")
    assert load_inputs(str(tmp_path / "x.npy"))[0].shape == (2, 3)
    assert len(load_inputs(str(tmp_path / "x.npz"))) == 2
    assert load_inputs(str(tmp_path / "x.pt"))[0].shape == (4,)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt"])
def test_a_broken_file_of_inputs_is_one_clear_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(VerificationError, match=name) as error:
        load_inputs(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_reference_models_take_what_is_inferred():
    model = models.all_models()["residual"]()
    assert infer_example_inputs(model, quick=True) is not None
