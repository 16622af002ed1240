"""rewrite.checkpoint.graph_values: arguments and signatures of graphs as plain data, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from rewrite.checkpoint.graph_values import decode, encode, example, identifier
from rewrite.errors import CheckpointError


def node() -> fx.Node:
    return fx.Graph().placeholder("x")


@pytest.mark.parametrize(
    "value",
    [
        1, 2.5, "text", None, True, (1, (2, [3])), [1, None], {"dim": (1, 2)}, slice(0, None, 2),
        range(3), torch.Size((2, 3)), torch.float16, torch.channels_last, torch.device("cpu"),
        Ellipsis,
    ],
)  # fmt: skip
def test_an_argument_comes_back_as_it_was(value: Any) -> None:
    made = decode(encode(value, node()), {})
    assert made == value and type(made) is type(value)


def test_a_node_comes_back_by_its_name() -> None:
    x = node()
    assert decode(encode((x, 1), x), {"x": x}) == (x, 1)


def test_what_is_no_plain_data_is_not_written() -> None:
    with pytest.raises(CheckpointError, match="an argument of type object"):
        encode(object(), node())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"node": "y"}, "before it is computed"),
        ({"torch": "load"}, "with torch.load as an argument"),
        ({"torch": "__dict__"}, "with torch.__dict__ as an argument"),
        ({"slice": [1, 2]}, "of kind 'slice'"),
        ({"call": ["os.system"]}, "of kind 'call'"),
        ({"tuple": [1], "list": []}, "no plain data"),
        ([1], "no plain data"),
        ({"dict": [[{"tuple": [1]}, 2]]}, "whose key is no text"),
    ],
)
def test_what_a_file_says_is_held_to_a_few_kinds(value: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        decode(value, {})


@pytest.mark.parametrize("name", ["a b", "x)", "", "lambda", "ﬁ", 3, "x\n"])
def test_a_name_of_a_file_is_an_identifier(name: Any) -> None:
    with pytest.raises(CheckpointError, match="the name"):
        identifier(name)
    assert identifier("x_1") == "x_1"


def test_an_example_has_the_structure_described() -> None:
    assert example(["dict", ["a", "b"], [None, ["tuple", None, [None, None]]]]) == {
        "a": 0, "b": (0, 0),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="takes or returns a 'set'"):
        example(["set", None, []])
