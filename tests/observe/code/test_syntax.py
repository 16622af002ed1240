"""Tests that a model has decided, and where the functions of a file stand."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from rewrite.observe.code.syntax import decided, function_at, functions_in, lacks


class Block(nn.Module):
    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm, self.act, self.bias = pre_norm, "gelu", None
        self.config = SimpleNamespace(depth=2)


def parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("self.pre_norm", True), ("not self.pre_norm", False), ("self.training", False),
        ("self.act == 'gelu'", True), ("self.bias is None", True), ("flag", None),
        ("self.bias is not None and flag", False), ("self.pre_norm or flag", True),
        ("self.pre_norm and flag", None), ("size > 1", True),
    ],
)  # fmt: skip
def test_what_the_model_has_decided(text: str, wanted: bool | None) -> None:
    assert decided(parsed(text), [Block(True)], "self", {"size": 3}) is wanted


def test_modules_that_disagree_decide_nothing() -> None:
    modules = [Block(True), Block(False)]
    assert decided(parsed("self.pre_norm"), modules, "self", {}) is None
    assert decided(parsed("self.pre_norm"), modules[:1], "self", {}) is True


def test_a_line_that_reads_an_attribute_that_no_module_has_cannot_run() -> None:
    assert lacks([Block(True)], "adapter") and not lacks([Block(True)], "act")
    assert not lacks([], "adapter")


def test_functions_stand_in_their_class_and_the_innermost_holds_a_line(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text(
        "def outer(x):\n    def inner(y):\n        return y\n    return inner(x)\n\n\n"
        "class Layer:\n    def forward(self, x):\n        return x\n"
    )
    found = {(node.name, inside) for node, inside in functions_in(str(file))}
    assert found == {("outer", ""), ("inner", ""), ("forward", "Layer")}
    names = [found[0].name if (found := function_at(str(file), n)) else None for n in (3, 4, 6, 9)]
    assert names == ["inner", "outer", None, "forward"]
