"""A tensor by its place has the name that it has in a state dict."""

from __future__ import annotations

from torch import nn

from rewrite.graph.refs import Readers, TensorRef


def test_names_are_those_of_a_state_dict() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    refs = [
        TensorRef(owner, key)
        for owner, module in model.named_modules()
        for key in (*module._parameters, *module._buffers)
    ]
    assert [ref.name for ref in refs] == list(model.state_dict())
    assert [TensorRef.of(name) for name in model.state_dict()] == refs


def test_a_tensor_of_the_root_has_no_dot() -> None:
    assert TensorRef("", "scale").name == "scale" and TensorRef.of("scale") == TensorRef(
        "", "scale"
    )


def test_equal_places_are_one_key() -> None:
    assert len({TensorRef("a", "weight"), TensorRef("a", "weight"), TensorRef("a", "bias")}) == 2


def test_readers_are_all_of_them_only_where_they_say_so() -> None:
    assert Readers((), True).known and not Readers((), False, "opaque code").known
