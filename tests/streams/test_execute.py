"""A plan carried out: every tensor that it names is written, and one that is left out is wrong."""

from __future__ import annotations

import torch

from tests.streams.blocks import PreNorm, X, bare, centred, draw, error, rotated


def test_one_writer_left_out_is_wrong() -> None:
    """The negative twin: a bias that is not centred is an error of more than 1e-3."""
    model = draw(PreNorm())
    result = centred(model)
    wrong = result.model
    wrong.blocks[0].mlp[2].bias = model.blocks[0].mlp[2].bias
    assert error(model, wrong, X) > 1e-3


def test_a_layer_scale_is_absorbed_by_its_writer() -> None:
    model = draw(PreNorm(scale=True))
    result = centred(model)
    assert len(result.report.changes) == 1
    assert error(model, result.model, X) < 1e-13
    assert torch.equal(result.model.blocks[0].gamma, torch.ones(16, dtype=torch.float64))


def test_one_tensor_left_out_is_wrong() -> None:
    """The negative twin: positions that are not turned are an error of more than 1e-3."""
    model = bare()
    wrong = rotated(model).model
    wrong.positions = model.positions
    assert error(model, wrong, X) > 1e-3


def test_the_inverse_turns_it_back() -> None:
    model = bare()
    turned = rotated(model, seed=5).model
    back = rotated(turned, seed=5, inverse=True).model
    assert not torch.allclose(turned.embed.weight, model.embed.weight)
    for name, tensor in back.state_dict().items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-14)
    other = rotated(turned, seed=6, inverse=True).model
    assert not torch.allclose(other.embed.weight, model.embed.weight)
