"""What is known of objects that hold a value."""

from __future__ import annotations

import ast

from rewrite.observe.code.fields import ANYWHERE, fields_of_dict, spread


def display(text: str) -> ast.Dict:
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Dict)
    return node


def holds(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "h"


def test_a_dictionary_holds_the_value_under_its_keys() -> None:
    assert fields_of_dict(display("{'x': h, 'y': mask}"), holds) == {"x"}
    assert spread(frozenset({"x"})) == {"x": True}


def test_a_key_that_is_computed_may_be_any() -> None:
    assert fields_of_dict(display("{key: h}"), holds) == {ANYWHERE}
    assert fields_of_dict(display("{**others, 'x': h}"), holds) == {ANYWHERE}
    assert spread(frozenset({ANYWHERE})) == {} and spread(None) == {}
